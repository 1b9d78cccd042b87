"""What the documentation says, and its Python blocks in README and in docstrings.

Those of the pages are a test of the deep tier.
"""

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

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(
    r'^```python(?: title="(.*?)")?\n(.*?)^```', re.DOTALL | re.MULTILINE
)
"""A block and its title: ``raises Error: message``, ``needs JAX``, a file or none."""


def blocks(text):
    return BLOCK.findall(text)


def sections(page):
    """The blocks of each section, after those before the first section."""
    first, *rest = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)
    return {
        ": ".join([page.stem, *section.splitlines()[:1]]): blocks(first + section)
        for section in rest or [""]
        if blocks(first + section)
    }


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCKS = blocks(README.read_text())
MODULES = [m.name for m in pkgutil.walk_packages(jaxlinear.__path__, "jaxlinear.")]


@pytest.fixture(autouse=True)
def _ordinary_settings():
    """A reader's settings, not those of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def lines_of(code):
    """Its lines without their indentation."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


def run(title, code, names):
    """Run a block, or compare it with the file that it is said to be from."""
    if title.startswith("needs JAX "):
        needed = tuple(map(int, title.removeprefix("needs JAX ").split(".")))
        if jax.__version_info__ < needed:
            pytest.skip(title)
        title = ""
    if not title:
        exec(compile(code, "documentation", "exec"), names)
    elif title.startswith("raises "):
        name, _, message = title.removeprefix("raises ").partition(": ")
        with pytest.raises(Exception, match=re.escape(message) or None) as error:
            exec(compile(code, "documentation", "exec"), names)
        assert error.type.__name__ == name
    else:
        assert lines_of(code) in lines_of((ROOT / title).read_text())


@pytest.mark.parametrize(
    ("title", "code"), BLOCKS, ids=[code.splitlines()[0] for _, code in BLOCKS]
)
def test_python_block_of_the_readme_runs(title, code):
    run(title, code, {})


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_no_block_of_python_is_left_out(page):
    text = page.read_text()
    assert len(re.findall(r"^ *```py", text, re.MULTILINE)) == len(blocks(text))


def test_figures_of_readme_and_documentation_are_those_of_our_results(monkeypatch):
    """`python -m benchmarks.pages` writes them; results may be older, and say so."""
    pages = pytest.importorskip("benchmarks.pages")  # It needs matplotlib.
    monkeypatch.setattr(sys, "argv", ["pages", "--check"])
    pages.main()


def test_figures_of_the_headline_are_the_mean_of_layers_and_the_step_of_the_model():
    pages = pytest.importorskip("benchmarks.pages")
    measured = json.loads((pages.RESULTS / "accuracy.json").read_text())["measurements"]
    error = {
        m["layer"]: f"{m['error']:.1e}"
        for m in measured
        if (m["dtype"], m["quantity"], m["precision"]) == ("mixed", "∇W", "default")
    }
    timed = pages.results_file.read(pages.RESULTS / "native.json")
    layers = [*pages.ratios(timed)["Flax NNX", "mixed"].values()]
    [model] = (
        row.ratio
        for row in pages.results_file.rows_of(timed)
        if (row.workload, row.library, row.dtype) == ("GPT step", "Flax NNX", "mixed")
    )
    mean = pages.geometric_mean(layers)
    headline = (
        f"error is {error['jaxlinear']}; Flax's is {error['Flax']}. On an Intel Xeon"
        " with bfloat16 instructions a layer's forward and backward pass is"
        f" {mean:.1f} times as fast as Flax's (geometric mean of {len(layers)} shapes),"
        f" and a small GPT's training step {model:.1f} times."
    )
    for page in (README, ROOT / "docs" / "index.md"):
        assert headline in " ".join(page.read_text().split())


def test_the_memory_of_the_loss_is_that_of_our_results():
    loss = pytest.importorskip("benchmarks.loss")  # It needs matplotlib.
    rows = json.loads(loss.RESULTS.read_text())["rows"]
    fields = {"target": "cpu", "sizes": loss.SMALL}
    memory = {
        row["contender"]: f"{row['temporary_bytes'] / 2**20:,.0f}"
        for row in loss.chosen(rows, "loss", "float32", **fields)
    }
    sizes = "{rows:,} × {width} → {classes:,}".format(**loss.SMALL)
    sentence = (
        f"{memory['ours']} MiB of temporaries on a CPU instead of"
        f" {memory['unfused']} at {sizes}."
    )
    assert sentence in " ".join(README.read_text().split())


def test_readme_is_read_in_a_few_minutes():
    assert len(README.read_text().split()) <= 700


@pytest.mark.parametrize("name", ["jaxlinear", *MODULES])
def test_docstring_examples_are_right(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_public_functions_and_classes_have_examples():
    # `doctest.testmod` passes where there is nothing to run.
    from jaxlinear import linen, nnx, torch

    functions = jaxlinear.linear, jaxlinear.plain_autodiff, jaxlinear.explain
    functions += (jaxlinear.save_linear_outputs,)
    functions += nnx.convert, nnx.revert, nnx.convert_tree, nnx.revert_tree
    functions += nnx.layers_of, nnx.dimension_numbers, linen.layers_of
    functions += torch.load, torch.save
    classes = jaxlinear.Products, nnx.Linear, linen.Linear, linen.Dense
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
        "ExampleValues",
        "FLOAT8",
        "FLOAT8_E4M3",
        "GradientNoise",
        "INT8",
        "LogLikelihood",
        "PRIMITIVES",
        "Product",
        "Products",
        "clipped_grad",
        "explain",
        "gradient_noise",
        "inspect",  # a module
        "linear",
        "linear_cross_entropy",
        "linear_log_likelihood",
        "plain_autodiff",
        "save_linear_outputs",
        "squared_grad_norms",
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
