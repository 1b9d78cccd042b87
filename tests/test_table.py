"""Every cell of the table of transformations (`tests/table`).

What the naive formula does, our layers do, with the values of float64; what the others
do is what the page says that they do.
"""

import pytest
from table.layers import LAYERS, OURS
from table.measure import NOT_APPLICABLE, ROWS, check, outcome
from table.page import in_words, recorded

RECORDED = recorded()
MUST_PASS = [
    (row, column)
    for row in ROWS
    for column in [*OURS, "`x @ w.T + b`"]
    if (row, column) not in NOT_APPLICABLE
]


@pytest.mark.parametrize(("row", "column"), MUST_PASS)
def test_ours_and_the_naive_formula_pass(row, column):
    check(ROWS[row], column, LAYERS[column])


# The page says so of each peer, for the versions of JAX that it was written with.
PEERS = [
    (row, column)
    for row in ROWS
    for column in LAYERS
    if column not in OURS and (in_words(row), column) in RECORDED
]


@pytest.mark.parametrize(("row", "column"), PEERS)
def test_peers_do_what_the_page_says(row, column):
    assert outcome(ROWS[row], column, LAYERS[column]) == RECORDED[in_words(row), column]


def test_the_page_claims_no_failure_of_ours_and_no_row_that_is_not_tested():
    ours = {key: cell for key, cell in RECORDED.items() if key[1] in OURS}
    assert {row for row, _ in ours} <= set(map(in_words, ROWS))
    assert set(ours.values()) <= {"✓", "✓ (switch)", "–"}
