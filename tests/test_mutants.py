"""The tests of the tests: of what no exception would show, they notice each break."""

import pytest
from mutants import MUTANTS, killed, replace

from jaxlinear import _formulas


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_package_makes_a_test_fail(name):
    is_killed, printed = killed(name, MUTANTS[name])
    assert is_killed, printed


def test_a_symbol_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="no_such_formula"):
        replace(_formulas, "no_such_formula", lambda right: right)
