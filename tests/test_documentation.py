"""Every Python block of the documentation and every example of a docstring runs."""

import doctest
import importlib
import importlib.metadata
import json
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import pytest

import jaxlinear
from benchmarks import readme
from benchmarks.aot import study

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


BLOCKS = blocks(README.read_text())
SECTIONS = {
    f"{page.stem}: {section.splitlines()[0]}": blocks(section)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    if blocks(section)
}
MODULES = [m.name for m in pkgutil.walk_packages(jaxlinear.__path__, "jaxlinear.")]


@pytest.fixture(autouse=True)
def _ordinary_settings():
    """A reader's settings, not those of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("block", BLOCKS, ids=[b.splitlines()[0] for b in BLOCKS])
def test_python_block_of_the_readme_runs(block):
    exec(compile(block, str(README), "exec"), {})


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_section_of_the_documentation_runs(section):
    """Its blocks in order. What is not installed here ends it; the deep tier has it."""
    names = {}
    for block in section:
        for module in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
            pytest.importorskip(module)
        exec(compile(block, "docs", "exec"), names)


def test_figures_in_the_readme_are_those_of_our_results(monkeypatch):
    """`python -m benchmarks.readme` writes them; results may be older, and say so."""
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    readme.main()


def test_figures_on_the_page_about_scale_are_those_of_our_results():
    """`python -m benchmarks.aot.study` writes them."""
    page, document = study.PAGE.read_text(), json.loads(study.RESULTS.read_text())
    assert study.written(page, study.tables(document)) == page


@pytest.mark.parametrize("name", ["jaxlinear", *MODULES])
def test_docstring_examples_are_right(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_public_functions_and_classes_have_examples():
    # `doctest.testmod` passes where there is nothing to run.
    from jaxlinear import linen, nnx, torch

    functions = jaxlinear.linear, jaxlinear.plain_autodiff, jaxlinear.explain
    functions += nnx.convert, nnx.revert, nnx.convert_tree, nnx.revert_tree
    functions += torch.load, torch.save
    classes = jaxlinear.Products, nnx.Linear, linen.Linear
    for public in functions + classes:
        assert doctest.DocTestParser().get_examples(public.__doc__)


def test_importing_the_package_needs_jax_alone():
    program = (
        "import sys; sys.modules['flax'] = None; import jaxlinear;"
        " print(*sorted(n for n in vars(jaxlinear) if not n.startswith('_')))\n"
        "for api in 'nnx', 'linen':\n"
        "    try: getattr(jaxlinear, api)\n"
        "    except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    names, *refusals = result.stdout.splitlines()
    assert names.split() == [
        "ALTERNATIVE_FLOAT16",
        "FLOAT8",
        "FLOAT8_E4M3",
        "INT8",
        "Product",
        "Products",
        "explain",
        "inspect",  # a module
        "linear",
        "plain_autodiff",
        "save_linear_outputs",
    ]
    assert refusals == [
        f"jaxlinear.{api} needs Flax: pip install 'jaxlinear[flax]'"
        for api in ("nnx", "linen")
    ]


def test_modules_are_there_without_an_import_of_their_own():
    assert jaxlinear.nnx.Linear
    assert jaxlinear.linen.Linear
    assert jaxlinear.__version__ == importlib.metadata.version("jaxlinear")
    with pytest.raises(
        AttributeError, match=r"^module 'jaxlinear' has no attribute 'a'"
    ):
        _ = jaxlinear.a
