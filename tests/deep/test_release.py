"""What a release is made of: built, checked, installed where nothing is, and used."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import jaxlinear

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The wheel and the source of a clean copy of what is committed or about to be."""
    for tool in "build", "twine":
        if not importlib.util.find_spec(tool):
            pytest.skip(f"{tool} is not installed")
    copy, dist = (tmp_path_factory.mktemp(name) for name in ("copy", "dist"))
    listed = "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"
    names = [n for n in run(*listed, cwd=ROOT).split("\0") if (ROOT / n).is_file()]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", str(dist), cwd=copy)
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


def test_both_files_pass_the_check_of_an_index(release):
    printed = run(
        sys.executable, "-m", "twine", "check", "--strict", *map(str, release)
    )
    assert printed.count("PASSED") == 2


def test_the_wheel_has_the_package_and_nothing_else(release):
    names = zipfile.ZipFile(release[0]).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "jaxlinear",
        f"jaxlinear-{jaxlinear.__version__}.dist-info",
    }
    assert "jaxlinear/py.typed" in names


def test_the_source_has_what_its_tests_and_its_pages_need(release):
    with tarfile.open(release[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["README.md", "LICENSE", "CITATION.cff", "mkdocs.yml", "docs/index.md"]
    needed += ["tests/test_values.py", "docs/transformations.md"]
    needed += ["benchmarks/aot/study.py", "benchmarks/results/native.json"]
    needed += ["examples/digits_nnx.py"]
    assert names.issuperset(needed)


def test_an_empty_environment_imports_the_wheel_and_takes_a_gradient(release, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", release[0])
    program = (
        "import jax, jax.numpy as jnp, jaxlinear\n"
        "x, weight = jnp.ones((8, 3)), jnp.ones((2, 3))\n"
        "print(jaxlinear.__version__)\n"
        "print(jax.grad(lambda w: jaxlinear.linear(x, w).sum())(weight)[0, 0])\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    printed = run(python, "-c", program, cwd=tmp_path, env=environment)
    assert printed.split() == [jaxlinear.__version__, "8.0"]
    installed = run(python, "-m", "pip", "list", "--format=freeze").lower()
    assert "flax" not in installed


def test_the_version_is_the_same_wherever_it_is_written():
    written = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert written[1] == jaxlinear.__version__
    assert f"## {jaxlinear.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("tool", ["ruff", "pyright"])
def test_linters_are_pinned_to_one_version(tool):
    extras = re.search(rf'"{tool}==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(rf"{tool}==([\d.]+)", hooks)) <= {extras[1]}
