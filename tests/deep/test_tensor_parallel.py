"""The example program ``examples/tensor_parallel.py``, which checks itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "tensor_parallel.py"
RUN = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("XLA_FLAGS", None)  # A user has not the eight devices of these tests.


def run(*command):
    return subprocess.run(
        [sys.executable, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_split_network_passes_its_checks_and_says_what_it_checked():
    result = run(str(PROGRAM))
    assert (result.returncode, result.stderr) == (0, "")
    rows = [line.strip("│").split("│") for line in result.stdout.splitlines()]
    rows = [tuple(cell.strip() for cell in row) for row in rows if len(row) == 3]
    held = {name: shape for name, shape, _ in rows[:4]}
    assert held == {
        "column.weight": "(32, 64)",
        "column.bias": "(32,)",
        "row.weight": "(10, 32)",
        "row.bias": "(10,)",
    }
    sent = [(kind, shape, over.split(":")[0]) for kind, shape, over in rows[4:]]
    over_data = [("all-reduce", shape, "data") for shape in ("()", *held.values())]
    assert sorted(sent) == sorted([("all-reduce", "(256, 10)", "model"), *over_data])


# name: what breaks the layer, and what the program then says
BROKEN = {
    "weight gradient one percent too large": (
        "import jaxlinear._linear as m; right = m.weight_gradient\n"
        "m.weight_gradient = lambda *a: right(*a) * 1.01\n",
        "loss off by",
    ),
    "bias gradient of the first image alone": (
        "import jaxlinear._linear as m\nm.bias_gradient = lambda G, _: G[0]\n",
        "the devices send {",
    ),
    "weight gathered on every device": (
        "import jax, jaxlinear._linear as m; right = m.forward_product\n"
        "whole = jax.sharding.PartitionSpec()\n"
        "gather = lambda W: jax.lax.with_sharding_constraint(W, whole)\n"
        "m.forward_product = lambda X, W, *a: right(X, gather(W), *a)\n",
        "a device makes a whole weight, of shape [128,64]",
    ),
    "parameters without their metadata": (
        "import jaxlinear.nnx as m; right = m.Linear.__init__\n"
        "def init(*args, kernel_metadata, bias_metadata=None, **kwargs):\n"
        "    right(*args, **kwargs)\n"
        "m.Linear.__init__ = init\n",
        "of column.bias, expected (32,)",
    ),
}


@pytest.mark.parametrize(("patch", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_layer_makes_the_program_fail(patch, message):
    result = run("-c", f"{patch}\n{RUN}")
    assert result.returncode == 1
    assert result.stderr.startswith("tensor_parallel.py: check failed: ")
    assert message in result.stderr
