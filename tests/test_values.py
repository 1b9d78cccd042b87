"""The values of Y and of each gradient, against float64, for any shape and dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracle import (
    assert_rounded_once,
    exact,
    naive,
    random_array,
    random_problem,
    relative_error,
    wide,
)

from jaxlinear import linear

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]


@st.composite
def leading_axes(draw, most_rows=2000):
    """Up to five axes of up to 17 elements, and not more rows than that in all."""
    sizes = draw(st.lists(st.integers(0, 17), max_size=5))
    while math.prod(sizes) > most_rows:
        sizes[sizes.index(max(sizes))] = 1
    return tuple(sizes)


@settings(max_examples=30)
@given(
    leading=leading_axes(),
    in_features=st.integers(0, 17),
    out_features=st.integers(0, 17),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_output_and_gradients_are_the_formulas_rounded_once(
    leading, in_features, out_features, dtype, with_bias, seed
):
    with jax.enable_x64(dtype == "float64"):
        x, weight, bias, cotangent = random_problem(
            leading, in_features, out_features, dtype, seed
        )
        used = bias if with_bias else None
        y, vjp = jax.vjp(linear, x, weight, used)
        actual = (y, *vjp(cotangent))
        rows = int(np.prod(leading))
        terms = (in_features, out_features, rows, rows)
        zero = np.zeros(bias.shape)
        expected = exact(x, weight, bias if with_bias else zero, cotangent)
        for value, (want, magnitude), n in zip(actual, expected, terms, strict=True):
            if value is not None:
                assert value.dtype == dtype
                assert_rounded_once(value, want, magnitude, n)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 2, 1)], ids=str)
def test_gradients_are_those_of_the_naive_formula(leading, dtype):
    x, weight, bias, cotangent = random_problem(leading, 5, 4, dtype)
    _, ours = jax.vjp(linear, x, weight, bias)
    _, reference = jax.vjp(naive, x, weight, bias)
    for actual, expected in zip(ours(cotangent), reference(cotangent), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_gradients_to_second_order_are_those_of_finite_differences(leading, with_bias):
    with jax.enable_x64(True):
        x, weight, bias, _ = random_problem(leading, 3, 2, "float64")
        arguments = (x, weight, bias) if with_bias else (x, weight)
        # A nonlinearity, so that the second derivative is not zero.
        check_grads(
            lambda *a: jnp.sin(linear(*a)), arguments, order=2, modes=["rev"], rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=["float32", "mixed"])
def test_third_derivatives_in_reverse_mode_are_those_of_the_naive_formula(dtype):
    x, weight, bias, _ = random_problem((3,), 2, 2, "float32")

    def third(layer):
        def loss(weight):
            return jnp.sum(layer(x, weight, bias, dtype=dtype).astype("float32") ** 3)

        return jax.jacrev(jax.jacrev(jax.grad(loss)))(weight)

    expected = np.asarray(third(naive))
    tolerance = 1e-5 if dtype is None else 2 * float(jnp.finfo(dtype).eps)
    assert relative_error(third(linear), wide(expected)) < tolerance


MIXED = {
    "bfloat16-compute": ("float32", "float32", "float32", "bfloat16"),
    "float16-compute": ("float32", "float32", "float32", "float16"),
    "bfloat16-input": ("bfloat16", "float32", "float32", "bfloat16"),
    "bfloat16-weight": ("float32", "bfloat16", "float32", "float32"),
    "bfloat16-bias": ("float32", "float32", "bfloat16", "float32"),
    "integer-input": ("int32", "float32", "float32", "float32"),
    "boolean-input": ("bool", "float32", "float32", "bfloat16"),
    "complex-weight": ("float32", "complex64", "float32", "complex64"),
    "complex-input": ("complex64", "float32", "float32", "complex64"),
}


@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_each_gradient_has_the_dtype_of_its_argument_and_is_rounded_to_it_once(dtypes):
    *argument_dtypes, dtype = dtypes
    x, weight, bias, _ = (
        a.astype(d)
        for a, d in zip(
            random_problem((7,), 5, 4, "float32"), [*argument_dtypes, "f4"], strict=True
        )
    )
    cotangent = random_array(1, (7, 4), dtype)
    y, vjp = jax.vjp(functools.partial(linear, dtype=dtype), x, weight, bias)
    assert y.dtype == dtype

    # The products see the operands in the compute dtype, the bias is added as it is.
    expected = exact(x.astype(dtype), weight.astype(dtype), bias, cotangent)
    arguments = (y, x, weight, bias)
    for value, argument, (want, magnitude), terms in zip(
        (y, *vjp(cotangent)), arguments, expected, (5, 4, 7, 7), strict=True
    ):
        if jnp.issubdtype(argument.dtype, jnp.inexact):
            assert value.dtype == argument.dtype
            real = not jnp.issubdtype(argument.dtype, jnp.complexfloating)
            assert_rounded_once(value, want.real if real else want, magnitude, terms)
        else:
            assert value.dtype == jax.dtypes.float0


def test_default_dtype_is_the_promoted_dtype_of_the_arguments():
    with jax.numpy_dtype_promotion("standard"):
        x, weight = jnp.ones((2, 3), "bfloat16"), jnp.ones((4, 3), "float32")
        assert linear(x, weight).dtype == "float32"
        assert linear(x, weight.astype("bfloat16")).dtype == "bfloat16"
        assert linear(x.astype("int32"), weight).dtype == "float32"
        assert linear(x, weight, jnp.ones(4, "complex64")).dtype == "complex64"


def test_strict_promotion_refuses_mixed_dtypes_as_jax_numpy_does():
    x, weight = jnp.ones((2, 3), "bfloat16"), jnp.ones((4, 3), "float32")
    with pytest.raises(jax.dtypes.TypePromotionError):
        linear(x, weight)
    assert linear(x, weight, dtype="float32").dtype == "float32"


def test_output_is_rounded_once_where_the_naive_formula_rounds_twice():
    x, weight, bias, _ = random_problem((512,), 64, 64, "bfloat16")
    expected = wide(x) @ wide(weight).T + wide(bias)
    nearest = expected.astype(jnp.bfloat16)
    # The float32 accumulator can tip a value that lies between two bfloat16 numbers.
    assert np.mean(np.asarray(linear(x, weight, bias)) != nearest) < 1e-3
    twice = expected - wide(bias)
    twice = twice.astype(jnp.bfloat16) + np.asarray(bias)
    assert np.mean(twice != nearest) > 0.1


def test_float16_output_survives_a_product_that_alone_would_overflow():
    x, weight = jnp.full((1, 1), 300, "float16"), jnp.full((1, 1), 300, "float16")
    bias = jnp.full(1, -60_000, "float16")
    assert linear(x, weight, bias)[0, 0] == jnp.float16(300 * 300 - 60_000)
    assert naive(x, weight, bias)[0, 0] == jnp.inf


def test_bias_gradient_of_many_ones_is_their_number():
    weight, bias = jnp.ones((1, 1), "bfloat16"), jnp.zeros(1, "bfloat16")
    x = jnp.ones((65_536, 1), "bfloat16")
    _, vjp = jax.vjp(lambda b: linear(x, weight, b), bias)
    assert vjp(jnp.ones((65_536, 1), "bfloat16"))[0][0] == 65_536


def test_integer_input_has_no_gradient_and_the_weight_still_has_one():
    x, weight = jnp.arange(6).reshape(2, 3), jnp.ones((4, 3))

    def loss(x, weight):
        return linear(x, weight, dtype="float32").sum()

    grad_x, grad_weight = jax.grad(loss, (0, 1), allow_int=True)(x, weight)
    assert grad_x.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(grad_weight, np.tile([3.0, 5, 7], (4, 1)))
