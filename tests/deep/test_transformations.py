"""The rows of `tests/transformations` in few bits and in both modules.

The layer passes as in float32. Each row has one of them on the oldest JAX, in turn, and
the next two on others; all of them with ``EVERY_CASE``.
"""

import os

import jax
import pytest
from transformations.layers import LAYERS, LINEAR, NAIVE, PLAIN
from transformations.measure import ROWS, applies, check
from transformations.page import OLDEST

OURS = [name for name in LAYERS if name not in (LINEAR, NAIVE, PLAIN)]
CHOSEN = slice(0, 1) if jax.__version__ == OLDEST else slice(1, 3)
if os.environ.get("EVERY_CASE"):
    CHOSEN = slice(None)
CELLS = []
for k, row in enumerate(ROWS):
    names = [name for name in OURS if applies(ROWS[row], name)]
    first = k % len(names)
    names = names[first:] + names[:first]
    CELLS += [(row, name) for name in names[CHOSEN]]


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_modules_and_few_bits_pass(row, name):
    check(ROWS[row], name, LAYERS[name])
