"""The mutants that `tests/test_mutants.py` does not run, and every killer unbroken."""

import subprocess
import sys

import mutants
import pytest
from loud_mutants import MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_package_makes_a_test_fail(name):
    is_killed, printed = mutants.killed(name, MUTANTS[name])
    assert is_killed, printed


def test_what_notices_a_mutant_passes_without_one():
    every = (mutants.MUTANTS | MUTANTS).values()
    killers = sorted({f"tests/{mutant.killer}" for mutant in every})
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *killers]
    run = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
