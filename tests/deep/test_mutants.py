"""Each mutant makes the test fail that must notice it."""

import pytest
from mutants import MUTANTS, killed


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_package_makes_a_test_fail(name):
    is_killed, printed = killed(name)
    assert is_killed, printed
