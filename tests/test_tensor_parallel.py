"""The example program ``examples/tensor_parallel.py``, which checks itself."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "tensor_parallel.py"
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
