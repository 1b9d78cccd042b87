"""What each folder may import, read from its files."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxlinear"

# The frameworks that a folder or a file may import. All others import none.
FRAMEWORKS = {
    "_flax": {"flax"},
    "nnx": {"flax"},
    "linen.py": {"flax"},
    "torch": {"flax", "safetensors", "torch"},
    "inspect/_accuracy.py": {"flax"},  # It compares Flax's layer with ours.
}

# What these may import of the package.
OURS = {
    "_every_mode": {"_every_mode"},  # A reader copies it.
    "_op": {"_every_mode", "_op", "_plain", "_product"},
    "_loss": {
        "_checks",
        "_every_mode",
        "_loss",
        "_op",
        "_plain",
        "_product",
        "_product_checks",
    },
    "_examples": {"_every_mode", "_examples", "_linear", "_op", "_product"},
    "_linear.py": {
        "_checks",
        "_every_mode",
        "_op",
        "_plain",
        "_product",
        "_product_checks",
    },
    "_checks.py": set(),
    "_plain.py": set(),
    "_product.py": set(),
    "_product_checks.py": {"_checks", "_product"},
    "_flax": {"_checks", "_flax", "_linear", "_product_checks"},
    "nnx": {"_checks", "_flax", "_loss", "_product", "_product_checks", "nnx"},
    "linen.py": {"_checks", "_flax", "_loss", "_product"},
    "torch": {"_checks", "_flax", "nnx", "torch"},
}


def files(name):
    path = PACKAGE / name
    assert path.exists()
    return [*path.rglob("*.py")] if path.is_dir() else [path]


def imported(path):
    """The dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
            module = importlib.util.resolve_name(module, package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_frameworks_are_imported_only_where_they_may_be():
    allowed = {file: FRAMEWORKS[name] for name in FRAMEWORKS for file in files(name)}
    for path in files(""):
        tops = {name.partition(".")[0] for name in imported(path)}
        used = tops & {"flax", "safetensors", "torch"}
        assert used <= allowed.get(path, set()), path


@pytest.mark.parametrize("name", OURS)
def test_a_folder_imports_of_the_package_only_what_it_may(name):
    for path in files(name):
        ours = {n for n in imported(path) if n.startswith("jaxlinear.")}
        assert {n.split(".")[1] for n in ours} <= OURS[name], path


def test_importing_the_package_imports_no_framework():
    script = "import jaxlinear, sys; print(*{'flax', 'torch'} & sys.modules.keys())"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout == "\n"
