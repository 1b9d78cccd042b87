"""The rows of `tests/transformations` for every other layer.

In few bits and in both modules the layer passes as in float32; the naive formula passes
everywhere, and the plain `custom_vjp` does what the page says. On the oldest JAX each
row has one of the modules and recipes, in turn.
"""

import jax
import pytest
from transformations.layers import LAYERS, LINEAR, NAIVE, PLAIN
from transformations.measure import ROWS, applies, check, outcome
from transformations.page import OLDEST, in_words, recorded

OURS = [name for name in LAYERS if name not in (LINEAR, NAIVE, PLAIN)]
CELLS = []
for k, row in enumerate(ROWS):
    names = [name for name in OURS if applies(ROWS[row], name)]
    only = [names[k % len(names)]]
    CELLS += [(row, n) for n in (only if jax.__version__ == OLDEST else names)]


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_modules_and_few_bits_pass(row, name):
    check(ROWS[row], name, LAYERS[name])


@pytest.mark.parametrize("row", ROWS)
def test_the_naive_formula_passes(row):
    check(ROWS[row], NAIVE, LAYERS[NAIVE])


@pytest.mark.parametrize("row", ROWS)
def test_a_plain_rule_does_what_the_page_says(row):
    assert outcome(ROWS[row], PLAIN, LAYERS[PLAIN]) == recorded()[in_words(row), PLAIN]
