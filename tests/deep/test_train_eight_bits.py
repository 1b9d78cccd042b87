"""The example program ``examples/train_eight_bits.py``, run as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "train_eight_bits.py"


def run(folder, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # A user has not the eight devices of the tests.
    return subprocess.run(
        [sys.executable, str(PROGRAM), *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_losses_in_8_bits_are_those_in_bfloat16(tmp_path):
    result = run(tmp_path, "--steps", "80")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    row = r"│ (network|transformer block) +│ (\w+) +│ (\d) +│ ([\d.]+) +│ ([\d.]+) +│"
    rows = re.findall(row, result.stdout)
    assert len(rows) == 2 * 3 * 3
    # Something was learnt: a guess costs ln 10 = 2.3.
    assert all(float(loss) < 1 for *_, loss in rows)
    # 8 bits were used: no loss is that of bfloat16.
    losses = {tuple(key): loss for *key, loss, _ in rows}
    for (model, recipe, seed), loss in losses.items():
        assert recipe == "bfloat16" or loss != losses[model, "bfloat16", seed]
    assert (tmp_path / "eight-bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", ["9", "many"])
def test_steps_that_are_no_training_are_refused(tmp_path, steps):
    result = run(tmp_path, "--steps", steps)
    assert result.returncode == 2
    assert "argument --steps" in result.stderr
    assert not any(tmp_path.iterdir())
