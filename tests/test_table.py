"""The rows of the table of transformations (`tests/table`), for `linear`.

What the naive formula does, the layer does, with the values of float64. The other
columns, bfloat16, the modules and the peers, are in `deep/test_table.py`.
"""

import pytest
from table.layers import LAYERS, OURS
from table.measure import ROWS, TOPICS, check, rows_of
from table.page import PAGE, in_words, recorded


@pytest.mark.parametrize("row", ROWS)
def test_the_layer_passes(row):
    check(ROWS[row], "`linear`", LAYERS["`linear`"])


def test_no_row_has_the_name_of_another():
    assert len(ROWS) == sum(len(rows_of(module)) for module in TOPICS.values())


def test_the_page_claims_no_failure_of_ours_and_has_every_row():
    cells = recorded()
    ours = {key: cell for key, cell in cells.items() if key[1] in OURS}
    assert {row for row, _ in ours} == set(map(in_words, ROWS)), f"write {PAGE.name}"
    assert set(ours.values()) <= {"✓", "–", "refused"}
