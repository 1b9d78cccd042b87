"""README's example ``examples/digits_nnx.py``, run as a user runs it.

The other examples are in `deep/test_examples.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("XLA_FLAGS", None)  # A user has not the eight devices of these tests.


def test_digits_are_learnt_in_mixed_precision_and_what_that_gained_is_printed(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "digits_nnx.py")]
    result = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    accuracy = re.search(r"^held-out accuracy: ([\d.]+)%$", result.stdout, re.M)
    assert float(accuracy[1]) >= 96
    errors = re.search(
        r"gradient: (\S+), with Flax's layer (\S+)$", result.stdout, re.M
    )
    ours, flax = map(float, errors.groups())
    assert 0 < ours < 100 * np.finfo(np.float32).eps < 2**-12 < flax
    assert imread(tmp_path / "digits_nnx.png").shape[1] > 1000
