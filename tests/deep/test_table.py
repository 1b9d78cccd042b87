"""Every other cell of the table of transformations (`tests/table`).

Both modules pass as the function does (`test_table.py`), and the naive formula and the
other layers do what the page says that they do.
"""

import pytest
from table.layers import LAYERS, OURS
from table.measure import ROWS, check, outcome
from table.page import in_words, recorded

MODULES = [column for column in OURS if "Linear" in column]
PEERS = [column for column in LAYERS if column not in OURS]
NAIVE = "`x @ w.T + b`"


@pytest.mark.parametrize("column", [*MODULES, NAIVE])
@pytest.mark.parametrize("row", ROWS)
def test_modules_and_the_naive_formula_pass(row, column):
    check(ROWS[row], column, LAYERS[column])


@pytest.mark.parametrize("column", [peer for peer in PEERS if peer != NAIVE])
@pytest.mark.parametrize("row", ROWS)
def test_peers_do_what_the_page_says(row, column):
    said = recorded()[in_words(row), column]
    assert outcome(ROWS[row], column, LAYERS[column]) == said
