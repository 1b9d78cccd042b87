"""The tests of the tests: of what no exception would show, they notice each break.

`mutants.py` has the ways to break the package; `deep/test_mutants.py` runs the others.
"""

import pytest
from mutants import MUTANTS, killed, replace

from jaxlinear import _formulas

SILENT = [name for name, mutant in MUTANTS.items() if mutant.is_silent]


@pytest.mark.parametrize("name", SILENT)
def test_a_broken_package_makes_a_test_fail(name):
    is_killed, printed = killed(name)
    assert is_killed, printed


def test_there_are_at_most_ten_for_which_a_contributor_waits():
    assert 1 <= len(SILENT) <= 10
    assert not any(MUTANTS[name].killer.startswith("deep") for name in SILENT)


def test_a_symbol_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no_such_formula"):
        replace(_formulas, "no_such_formula", lambda right: right)
