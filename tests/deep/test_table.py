"""Every other cell of the table of transformations (`tests/table`).

In bfloat16 and in both modules the layer passes as in float32 (`test_table.py`);
the naive formula and the other layers do what the page says that they do.
"""

import pytest
from table.layers import LAYERS, OURS
from table.measure import NOT_APPLICABLE, ROWS, check, outcome
from table.page import in_words, recorded

OTHERS = [column for column in OURS if column != "`linear`"]
PEERS = [column for column in LAYERS if column not in OURS]
NAIVE = "`x @ w.T + b`"


@pytest.mark.parametrize("column", [*OTHERS, NAIVE])
@pytest.mark.parametrize("row", ROWS)
def test_ours_and_the_naive_formula_pass(row, column):
    if (row, column) not in NOT_APPLICABLE:
        check(ROWS[row], column, LAYERS[column])


@pytest.mark.parametrize("column", [peer for peer in PEERS if peer != NAIVE])
@pytest.mark.parametrize("row", ROWS)
def test_peers_do_what_the_page_says(row, column):
    said = recorded()[in_words(row), column]
    assert outcome(ROWS[row], column, LAYERS[column]) == said
