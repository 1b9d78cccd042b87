"""The table of transformations under the flags of JAX's next implementations.

They are read when JAX is imported, so each runs in a process of its own. The yardstick
is the naive formula: what it cannot do under a flag, the layer need not.
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
import conftest, json, sys
from table.layers import LAYERS
from table.measure import ROWS, outcome

def passing(layer):
    return {name: outcome(row, layer, LAYERS[layer]) for name, row in ROWS.items()}

print(json.dumps([passing("`linear`"), passing("`x @ w.T + b`")]))
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
    print({row: cell for row, cell in naive.items() if cell != "✓"})
    fails = {row: cell for row, cell in ours.items() if cell != "✓"}
    assert not {row: cell for row, cell in fails.items() if naive[row] == "✓"}
