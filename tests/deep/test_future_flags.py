"""The rows of `tests/transformations` under the flags of JAX's next implementations.

They are read when JAX is imported, so each runs in a process of its own. The yardstick
is the naive formula: what it cannot do under a flag, the layer need not. For JAX_REMAT3
that formula has the layer's checkpoint name, of which JAX 0.10.2 knows no `jax.vmap`
there; JAX 0.12.0.1 does, and no row fails. Each flag has every third row, another one;
all of them with ``EVERY_CASE``.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]

FAILURES = """
import conftest, json, os, sys
from jax.ad_checkpoint import checkpoint_name
from oracle import naive
from transformations.layers import LAYERS, LINEAR
from transformations.measure import ROWS, outcome

def named(*arguments, **options):
    return checkpoint_name(naive(*arguments, **options), "linear")

def failures(layer, rows):
    outcomes = {row: outcome(ROWS[row], "", layer) for row in rows}
    return {row: cell for row, cell in outcomes.items() if cell != "✓"}

rows = [*ROWS] if os.environ.get("EVERY_CASE") else [*ROWS][int(sys.argv[2]) :: 3]
ours = failures(LAYERS[LINEAR], rows)
print(json.dumps([ours, failures({"naive": naive, "named": named}[sys.argv[1]], ours)]))
"""


@pytest.mark.parametrize(
    ("first", "flag", "yardstick"),
    [
        (0, "JAX_CUSTOM_VJP3", "naive"),
        (1, "JAX_CUSTOM_JVP3", "naive"),
        (2, "JAX_REMAT3", "named"),
    ],
)
def test_the_layer_does_what_the_naive_formula_does(first, flag, yardstick):
    run = subprocess.run(
        [sys.executable, "-c", FAILURES, yardstick, str(first)],
        cwd=TESTS,
        env=os.environ | {flag: "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, naive = json.loads(run.stdout.splitlines()[-1])
    print(f"{len(ours)} rows fail with {flag}: {', '.join(ours)}")
    assert not {row: cell for row, cell in ours.items() if row not in naive}
