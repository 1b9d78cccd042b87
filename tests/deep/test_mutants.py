"""Every mutant that `tests/test_mutants.py` does not run, and the killers unbroken."""

import subprocess
import sys

import pytest
from mutants import MUTANTS, ROOT, killed

LOUD = [name for name, mutant in MUTANTS.items() if not mutant.is_silent]


@pytest.mark.parametrize("name", LOUD)
def test_a_broken_package_makes_a_test_fail(name):
    is_killed, printed = killed(name)
    assert is_killed, printed


def test_what_notices_a_mutant_passes_without_one():
    killers = {f"tests/{mutant.killer}" for mutant in MUTANTS.values()}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *sorted(killers)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
