"""Collectives in every dtype, with a bias and without one."""

import pytest
from test_collectives import (
    DTYPES,
    assert_collectives_of_naive,
    each_axis_type,
    each_layout,
)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@each_layout
@each_axis_type
def test_collectives_are_those_of_the_naive_formula(axis_type, layout, dtypes):
    assert_collectives_of_naive(axis_type, layout, dtypes, True)


@each_layout
@each_axis_type
def test_collectives_without_a_bias_are_those_of_the_naive_formula(axis_type, layout):
    assert_collectives_of_naive(axis_type, layout, DTYPES["mixed"], False)
