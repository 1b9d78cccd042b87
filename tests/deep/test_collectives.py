"""Collectives in the other dtypes, and without a bias."""

import pytest
from test_collectives import (
    DTYPES,
    assert_collectives_of_naive,
    each_axis_type,
    each_layout,
)

OTHERS = {name: dtypes for name, dtypes in DTYPES.items() if name != "mixed"}


@pytest.mark.parametrize("dtypes", OTHERS.values(), ids=OTHERS)
@each_layout
@each_axis_type
def test_collectives_are_those_of_the_naive_formula(axis_type, layout, dtypes):
    assert_collectives_of_naive(axis_type, layout, dtypes, True)


@each_layout
@each_axis_type
def test_collectives_without_a_bias_are_those_of_the_naive_formula(axis_type, layout):
    assert_collectives_of_naive(axis_type, layout, DTYPES["mixed"], False)
