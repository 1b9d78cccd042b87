"""An example, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
ENVIRONMENT.pop(
    "XLA_FLAGS", None
)  # A user does not have the eight devices of these tests.


def run(folder, name, *flags):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def printed_by(folder, name, *flags):
    """What an example prints if it succeeds without a warning."""
    result = run(folder, name, *flags)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    return result.stdout
