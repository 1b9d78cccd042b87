"""The notebook, run from its first cell to its last as its readers do."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "custom_derivative.ipynb"


@pytest.fixture(scope="module")
def notebook():
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    read = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in read.cells if cell.cell_type == "code")
    # Nobody has the name on an index. Not run here: it would change what is installed.
    assert first.source.splitlines()[-1] == '%pip install -q -e "..[examples]"'
    read.cells.remove(first)
    client = nbclient.NotebookClient(read, timeout=600, kernel_name="python3")
    return client.execute(cwd=str(NOTEBOOK.parent))


def outputs(notebook, kind):
    return [
        output["data"][kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if kind in output.get("data", {})
    ]


@pytest.mark.filterwarnings("ignore")  # Those of Jupyter, about its own parts.
def test_every_cell_of_the_notebook_runs_and_draws(notebook):
    assert len(outputs(notebook, "image/png")) == 2
    (table,) = outputs(notebook, "text/markdown")
    assert "| weight gradient |     1 | bfloat16 × bfloat16 |" in table
    printed = "".join(
        output.get("text", "")
        for c in notebook.cells
        for output in c.get("outputs", ())
    )
    assert "plain custom_vjp: can't apply forward-mode" in printed
    assert "jaxlinear: dY (1024, 256)" in printed
