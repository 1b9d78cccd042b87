"""Backward products in another dtype than the forward one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_rounded_once, exact, naive, random_problem, relative_error

import jaxlinear
from jaxlinear import linear

ROWS, IN, OUT = 64, 32, 48
KINDS = {
    # name: dtypes of the arguments, of the forward and of the backward products
    "the note on ROCm": ("float16", "float16", "bfloat16"),
    "float32 arguments": ("float32", "float16", "bfloat16"),
    "float32 gradients": ("float32", "bfloat16", "float32"),
    "low precision backward alone": ("float32", "float32", "bfloat16"),
}


def results(layer, x, weight, bias, cotangent):
    Y, vjp = jax.vjp(layer, x, weight, bias)
    return Y, *vjp(cotangent)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("leading", [(ROWS,), (4, 16), ()], ids=str)
def test_every_product_is_rounded_once_from_operands_of_its_own_dtype(kind, leading):
    dtype, forward, backward = kind
    x, weight, bias, cotangent = random_problem(leading, IN, OUT, dtype)
    cotangent = cotangent.astype(forward)
    layer = functools.partial(linear, dtype=forward, backward_dtype=backward)
    Y, *gradients = results(layer, x, weight, bias, cotangent)

    def in_dtype(dtype):
        return [a.astype(dtype) for a in (x, weight)]

    rows = int(np.prod(leading))
    (want, magnitude), *_, of_bias = exact(*in_dtype(forward), bias, cotangent)
    assert Y.dtype == forward
    assert_rounded_once(Y, want, magnitude, IN)
    _, of_x, of_weight, _ = exact(*in_dtype(backward), bias, cotangent.astype(backward))
    expected = zip((of_x, of_weight, of_bias), (OUT, rows, rows), strict=True)
    for gradient, ((want, magnitude), terms) in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        assert_rounded_once(gradient, want, magnitude, terms)


def test_gradients_that_float16_flushes_to_zero_survive():
    # 1e-9 is less than half the smallest subnormal number of float16, 6e-8.
    x, weight = jnp.full((ROWS, IN), 1e-9), jnp.full((OUT, IN), 1e-9)
    bias, cotangent = jnp.zeros(OUT), jnp.ones((ROWS, OUT), "float16")
    flushed = results(
        functools.partial(linear, dtype="float16"), x, weight, bias, cotangent
    )
    assert not np.any(flushed[1])
    assert not np.any(flushed[2])
    layer = functools.partial(linear, dtype="float16", backward_dtype="bfloat16")
    _, of_x, of_weight, _ = results(layer, x, weight, bias, cotangent)
    eps = float(jnp.finfo("bfloat16").eps)
    np.testing.assert_allclose(of_x, OUT * 1e-9, rtol=eps)
    np.testing.assert_allclose(of_weight, ROWS * 1e-9, rtol=eps)


def test_gradients_that_overflow_in_float16_survive():
    # Each sum of products is beyond 65504, the largest number of float16.
    x, weight = jnp.full((ROWS, IN), 100.0), jnp.full((OUT, IN), 100.0)
    bias, cotangent = jnp.zeros(OUT), jnp.full((ROWS, OUT), 60_000, "float16")
    in_float16 = functools.partial(naive, dtype="float16")
    for layer in (
        in_float16,
        functools.partial(linear, dtype="float16", reduce_dtype="float16"),
    ):
        _, of_x, of_weight, _ = results(layer, x, weight, bias, cotangent)
        assert np.all(np.isinf(of_x))
        assert np.all(np.isinf(of_weight))
    for reduce_dtype in (None, "bfloat16"):
        layer = functools.partial(
            linear,
            dtype="float16",
            backward_dtype="bfloat16",
            reduce_dtype=reduce_dtype,
        )
        _, of_x, of_weight, _ = results(layer, x, weight, bias, cotangent)
        # The operands are rounded, and with a reduce_dtype the result, too.
        eps = 3 * float(jnp.finfo("bfloat16").eps)
        np.testing.assert_allclose(of_x, OUT * 6e6, rtol=eps)
        np.testing.assert_allclose(of_weight, ROWS * 6e6, rtol=eps)


def test_float32_gradients_under_bfloat16_compute_are_those_of_float32():
    x, weight, bias, cotangent = random_problem((ROWS,), IN, OUT, "float32")
    cotangent = cotangent.astype("bfloat16")
    layer = functools.partial(linear, dtype="bfloat16", backward_dtype="float32")
    actual = results(layer, x, weight, bias, cotangent)[1:]
    wanted = list(exact(x, weight, bias, cotangent))[1:]
    for gradient, (want, _) in zip(actual, wanted, strict=True):
        assert relative_error(gradient, want) < 1e-6
    rounded = results(
        functools.partial(linear, dtype="bfloat16"), x, weight, bias, cotangent
    )
    assert relative_error(rounded[1], wanted[0][0]) > 1e-4


def kept_bytes(**options):
    x, weight, bias, _ = random_problem((ROWS,), IN, OUT, "float16")
    layer = jax.jit(functools.partial(linear, **options))
    _, vjp = jax.vjp(layer, x, weight, bias)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


def test_no_more_bytes_are_kept_for_a_backward_pass_of_the_same_width():
    assert kept_bytes(backward_dtype="bfloat16") == kept_bytes()


def dots(platform, **options):
    x, weight, bias, cotangent = random_problem((ROWS,), IN, OUT, "float16")
    function = functools.partial(results, functools.partial(linear, **options))
    traced = jax.jit(function).trace(x, weight, bias, cotangent)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    return {
        tuple(map(int, re.search(r"-> tensor<(\d+)x(\d+)x", line).groups())): line
        for line in lines
    }


def test_alternative_float16_is_a_hint_on_the_two_backward_products():
    lines = dots("rocm", backward_dtype="alternative_float16")
    assert 'grad_x = "true"' in lines[ROWS, IN]
    assert 'grad_y = "true"' in lines[OUT, IN]
    assert "grad_" not in lines[ROWS, OUT]
    assert f"(tensor<{ROWS}x{OUT}xf16>, tensor<{OUT}x{IN}xf16>)" in lines[ROWS, IN]


def test_there_is_no_hint_by_default():
    for platform in ("rocm", "cuda", "cpu"):
        assert not any("grad_" in line for line in dots(platform).values())


def test_alternative_float16_has_the_values_of_float16_on_cpu():
    arguments = random_problem((ROWS,), IN, OUT, "float16")
    hinted = functools.partial(linear, backward_dtype="alternative_float16")
    for actual, expected in zip(
        results(hinted, *arguments), results(linear, *arguments), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_plain_autodiff_is_backward_in_the_dtype_of_the_forward_product():
    x, weight, bias, _ = random_problem((ROWS,), IN, OUT, "float32")
    with jaxlinear.plain_autodiff():
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda w: jnp.sum(linear(x, w, bias, backward_dtype="bfloat16")))
        )(weight)
    assert "bf16" not in str(jaxpr)


def test_modules_take_a_backward_dtype():
    from flax import nnx

    from jaxlinear import linen
    from jaxlinear.nnx import Linear

    x = jnp.full((ROWS, IN), 1e-9)
    layer = Linear(
        IN, OUT, dtype="float16", backward_dtype="bfloat16", rngs=nnx.Rngs(0)
    )
    of_weight = nnx.grad(lambda m: m(x).sum().astype("float32"))(layer)["weight"][...]
    assert np.all(of_weight > 0)
    layer = linen.Linear(OUT, dtype="float16", backward_dtype="bfloat16")
    variables = layer.init(jax.random.key(0), x)
    of_variables = jax.grad(lambda v: layer.apply(v, x).sum().astype("float32"))(
        variables
    )
    assert np.all(of_variables["params"]["weight"] > 0)
    for refused in (
        lambda: Linear(IN, OUT, backward_dtype="int8", rngs=nnx.Rngs(0)),
        lambda: linen.Linear(OUT, backward_dtype="int8").init(jax.random.key(0), x),
    ):
        with pytest.raises(TypeError, match="`backward_dtype` must be a floating or"):
            refused()
