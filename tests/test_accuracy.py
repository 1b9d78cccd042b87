"""Every bit against float64, where sums are hard.

A sum of n terms with unit roundoff u is off by at most 7 √n u Σ|term| where roundings
are independent, but for one element in 10¹⁰ (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019, with λ = 7). The sums of all layers have
the unit roundoff of float32, whatever the dtype that they are rounded to.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    exact,
    naive,
    output_and_gradients,
    random_array,
    relative_error,
    wide,
)

from jaxlinear import linear

# name: dtype of the arguments, dtype of the computation
DTYPES = {
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
}
QUANTITIES = "Y", "∇X", "∇W", "∇B"

SUM_ROUNDOFF = float(jnp.finfo("float32").eps) / 2
each_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def results(layer, dtype, arrays):
    """Y, ∇X, ∇W and ∇B, of one compiled program."""
    return program(layer, dtype)(*arrays)


@functools.cache  # Arrays of the same shapes run the same program.
def program(layer, dtype):
    layer = functools.partial(layer, dtype=dtype)
    return jax.jit(functools.partial(output_and_gradients, layer))


def expected(dtype, arrays):
    """Each of them in float64, with the error that its sum may have."""
    x, weight, bias, cotangent = arrays
    rows, out_features = np.prod(cotangent.shape[:-1], dtype=int), weight.shape[0]
    terms = weight.shape[1] + 1, out_features, rows, rows
    values = exact(x.astype(dtype), weight.astype(dtype), bias, cotangent)
    return [
        (value, 7 * np.sqrt(n) * SUM_ROUNDOFF * magnitude)
        for (value, magnitude), n in zip(values, terms, strict=True)
    ]


def half_unit_in_the_last_place(values, dtype):
    """Of ``values`` rounded to ``dtype``, where they are not subnormal in it."""
    info = jnp.finfo(dtype)
    exponents = np.frexp(np.maximum(np.abs(values), float(info.smallest_normal)))[1]
    return np.ldexp(float(info.eps) / 2, exponents - 1)


def assert_half_a_unit_off_but_for_the_sum(dtype, arrays, flushed=0.0):
    actual = results(linear, dtype, arrays)
    for quantity, value, (want, of_sum) in zip(
        QUANTITIES, actual, expected(dtype, arrays), strict=True
    ):
        limit = half_unit_in_the_last_place(want, value.dtype) + of_sum + flushed
        worst = np.max(np.abs(wide(value) - want) / limit)
        assert worst <= 1, f"{quantity} is off by {worst:.3g} times the limit"


def problem(rows, in_features, out_features, dtypes, scale=lambda array: array):
    """The arguments of a layer of the usual initial scale, and a cotangent."""
    argument_dtype, dtype = dtypes
    shapes = (
        (rows, in_features),
        (out_features, in_features),
        (out_features,),
        (rows, out_features),
    )
    factors = 1, in_features**-0.5, in_features**-0.5, 1
    kinds = argument_dtype, argument_dtype, argument_dtype, dtype
    return [
        scale(factor * random_array((seed, rows), shape, "float32")).astype(kind)
        for seed, (shape, factor, kind) in enumerate(
            zip(shapes, factors, kinds, strict=True)
        )
    ]


# rows × in → out. Longer sums are in `deep/test_accuracy.py`.
SIZES = {
    "one row": (1, 1024, 1024),
    "many rows": (8192, 64, 64),
    "odd": (1000, 77, 130),
}


@each_dtype
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_each_element_is_half_a_unit_off_but_for_the_sum(size, dtypes):
    assert_half_a_unit_off_but_for_the_sum(dtypes[1], problem(*size, dtypes))


def test_input_gradient_of_one_row_is_not_one_long_sum():
    dtypes = DTYPES["float32"]
    arrays = problem(1, 1024, 4096, dtypes)
    _, weight, _, cotangent = arrays
    (_, (want, _), *_) = expected(dtypes[1], arrays)
    ours = relative_error(results(linear, dtypes[1], arrays)[1], want)
    assert 3 * ours < relative_error(jax.jit(jnp.matmul)(cotangent, weight), want)


@each_dtype
def test_values_over_twenty_orders_of_magnitude(dtypes):
    # float16 has 12, subnormal numbers included.
    orders = (-4, 1) if dtypes[0] == "float16" else (-10, 10)
    generator = np.random.default_rng(0)

    def over_orders(array):
        return array * np.float32(10) ** generator.uniform(*orders, array.shape).astype(
            "float32"
        )

    arrays = problem(512, 128, 64, dtypes, over_orders)
    # What is below the smallest normal number may be flushed to zero.
    flushed = float(jnp.finfo(dtypes[0]).smallest_normal)
    assert_half_a_unit_off_but_for_the_sum(dtypes[1], arrays, flushed)


@each_dtype
def test_sums_that_cancel(dtypes):
    x, weight, bias, cotangent = problem(512, 128, 64, dtypes)
    x = jnp.concatenate([x, -x * (1 + 2**-7)], 1)
    weight = jnp.concatenate([weight, weight], 1)
    x = jnp.concatenate([x, x])
    cotangent = jnp.concatenate([cotangent, -cotangent * (1 + 2**-7)])
    assert_half_a_unit_off_but_for_the_sum(dtypes[1], [x, weight, bias, cotangent])


@pytest.mark.parametrize("name", ["bfloat16", "float32", "mixed"])
def test_constant_cotangents_are_counted(name):
    argument_dtype, dtype = DTYPES[name]
    rows = 65_536
    arrays = [
        jnp.ones(shape, kind)
        for shape, kind in (
            ((rows, 8), argument_dtype),
            ((4, 8), argument_dtype),
            ((4,), argument_dtype),
            ((rows, 4), dtype),
        )
    ]
    *_, of_weight, of_bias = results(linear, dtype, arrays)
    np.testing.assert_array_equal(wide(of_bias), rows)
    np.testing.assert_array_equal(wide(of_weight), rows)


def classes(array):
    """0, 1, ±2 or 3 for zero, finite, infinite and not a number."""
    array = wide(array)
    infinite = np.where(np.isinf(array), 2 * np.sign(array), array != 0)
    return np.where(np.isnan(array), 3, infinite)


@each_dtype
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan], ids=str)
def test_infinities_and_nan_propagate_as_in_the_naive_formula(value, rows, dtypes):
    dtype = dtypes[1]
    x, weight, bias, cotangent = problem(rows, 48, 40, dtypes)
    x = x.at[rows // 2, 3].set(value).at[:, 20].set(0)
    weight = weight.at[7, 9].set(value).at[9, 3].set(0)
    bias, cotangent = bias.at[1].set(value), cotangent.at[0, 11].set(value)
    arrays = x, weight, bias, cotangent
    for ours, theirs in zip(
        results(linear, dtype, arrays), results(naive, dtype, arrays), strict=True
    ):
        ours, theirs = classes(ours), classes(theirs)
        # Rounding twice, the naive formula finds zeros where there are none.
        finite = np.isin(ours, (0, 1)) & np.isin(theirs, (0, 1))
        np.testing.assert_array_equal(ours[~finite], theirs[~finite])
        assert np.any(~finite)


@each_dtype
@pytest.mark.parametrize("rows", [1, 300])
def test_no_subnormal_is_lost_that_the_naive_formula_keeps(rows, dtypes):
    argument_dtype, dtype = dtypes
    tiny = float(jnp.finfo(dtype).smallest_normal) / 4
    x, cotangent = jnp.full((rows, 48), tiny), jnp.full((rows, 40), tiny)
    weight, bias = jnp.full((40, 48), 0.5), jnp.zeros(40)
    arrays = [a.astype(argument_dtype) for a in (x, weight, bias)]
    arrays.append(cotangent.astype(dtype))
    for ours, theirs in zip(
        results(linear, dtype, arrays), results(naive, dtype, arrays), strict=True
    ):
        assert np.all((classes(ours) == 1) | (classes(theirs) == 0))
