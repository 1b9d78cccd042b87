"""The example program ``examples/train_digits.py``, run as a user runs it.

Its flags, Linen and its checkpoints are in `deep/test_train_digits.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "train_digits.py"
COMMAND = [sys.executable, str(PROGRAM)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("XLA_FLAGS", None)  # A user has not the eight devices of these tests.
ROW = re.compile(r"(layer\d\.(?:weight|bias))\W+(\S+)\W+(\S+)\W+(\S+)")


def run(folder, *flags):
    return subprocess.run(
        [*COMMAND, *flags], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def accuracy(stdout):
    return float(re.search(r"^held-out accuracy: ([\d.]+)%", stdout, re.M)[1])


def test_default_run_classifies_97_percent_and_prints_small_gradient_errors(tmp_path):
    result = run(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert len(re.findall(r"^epoch \d+/30: ", result.stdout, re.M)) == 30
    assert accuracy(result.stdout) >= 97
    rows = ROW.findall(result.stdout)
    assert len(rows) == 12
    eps = float(np.finfo(np.float32).eps)
    for _, ours, naive, difference in rows[:6]:
        assert float(ours) < 100 * eps
        assert float(naive) < 100 * eps
        assert float(difference) < 100 * eps
    for _, ours, naive, _ in rows[6:]:  # bfloat16, where the naive formula rounds.
        assert 0 < float(ours) < 100 * eps < 2**-12 < float(naive)
    assert imread(tmp_path / "train_digits.png").shape[1] > 1000
