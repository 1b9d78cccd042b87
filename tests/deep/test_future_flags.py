"""The table of transformations under the flags of JAX's next implementations.

They are read when JAX is imported, so each runs in a process of its own. The yardstick
is the naive formula with the layer's checkpoint name: what it cannot do under a flag, the
layer need not. With JAX_REMAT3 that is to be mapped on JAX 0.10.2, which knows no
`jax.vmap` of such a name there; JAX 0.12.0.1 does everything under each flag.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parents[1]
FLAGS = ["JAX_CUSTOM_VJP3", "JAX_CUSTOM_JVP3", "JAX_REMAT3"]

OUTCOMES = """
import conftest, json
from jax.ad_checkpoint import checkpoint_name
from oracle import naive
from table.layers import LAYERS
from table.measure import ROWS, outcome

def named(*arguments, **options):
    return checkpoint_name(naive(*arguments, **options), "linear")

def outcomes(layer):
    return {name: outcome(row, "", layer) for name, row in ROWS.items()}

print(json.dumps([outcomes(LAYERS["`linear`"]), outcomes(named)]))
"""


@pytest.mark.parametrize("flag", FLAGS)
def test_the_layer_does_what_the_naive_formula_does(flag):
    run = subprocess.run(
        [sys.executable, "-c", OUTCOMES],
        cwd=TESTS,
        env=os.environ | {flag: "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, naive = json.loads(run.stdout.splitlines()[-1])
    print(
        "The naive formula:", {row: cell for row, cell in naive.items() if cell != "✓"}
    )
    fails = {row: cell for row, cell in ours.items() if cell != "✓"}
    assert not {row: cell for row, cell in fails.items() if naive[row] == "✓"}
