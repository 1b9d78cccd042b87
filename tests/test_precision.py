"""Each product has the precision that was asked for, in every derivative."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import DotAlgorithmPreset
from oracle import exact, naive, random_problem, relative_error

import jaxlinear
from jaxlinear import Precision, linear

ROWS, IN, OUT = 5, 3, 2  # Each product has a result of another shape.
PRODUCTS = {"forward": (ROWS, OUT), "input_grad": (ROWS, IN), "weight_grad": (OUT, IN)}
THREE = Precision("highest", "tensorfloat32", "default")
EACH = {"forward": "HIGHEST", "input_grad": "HIGH", "weight_grad": "DEFAULT"}
TF32_X3 = (
    "algorithm = <lhs_precision_type = tf32, rhs_precision_type = tf32,"
    " accumulation_type = f32, lhs_component_count = 1, rhs_component_count = 1,"
    " num_primitive_operations = 3"
)


def problem(dtype="float32"):
    return random_problem((ROWS,), IN, OUT, dtype)


def results(layer, x, weight, bias, cotangent):
    Y, vjp = jax.vjp(layer, x, weight, bias)
    return Y, *vjp(cotangent)


def products(function, *arguments, platform="cpu"):
    """The lowered text of each product, by the shape of its result."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    found = {}
    for line in lowered.as_text().splitlines():
        if "stablehlo.dot_general" in line:
            shape = re.search(r"-> tensor<([\dx]+)x", line)[1]
            shape = tuple(n for n in map(int, shape.split("x")) if n != 1)
            found.setdefault(shape, []).append(line)
    return found


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_product_has_its_own_precision(dtype, platform):
    layer = functools.partial(linear, precision=THREE)
    found = products(
        functools.partial(results, layer), *problem(dtype), platform=platform
    )
    for product, shape in PRODUCTS.items():
        (line,) = found[shape]
        assert f"precision = [{EACH[product]}, {EACH[product]}]" in line


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        ("tensorfloat32", "precision = [HIGH, HIGH]"),
        (lax.Precision.HIGHEST, "precision = [HIGHEST, HIGHEST]"),
        (("highest", "default"), "precision = [HIGHEST, DEFAULT]"),
        ("TF32_TF32_F32_X3", TF32_X3),
        (DotAlgorithmPreset.TF32_TF32_F32_X3, TF32_X3),
        (DotAlgorithmPreset.DEFAULT, "precision = [DEFAULT, DEFAULT]"),
    ],
    ids=str,
)
def test_one_precision_is_that_of_all_products(precision, text):
    layer = functools.partial(linear, precision=precision)
    found = products(functools.partial(results, layer), *problem(), platform="cuda")
    for shape in PRODUCTS.values():
        (line,) = found[shape]
        assert text in line


def test_default_precision_is_that_under_which_the_call_is_made():
    # As autodiff of the naive formula has it.
    x, weight, bias, cotangent = problem()
    with jax.default_matmul_precision("highest"):
        _, vjp = jax.vjp(linear, x, weight, bias)
    with jax.default_matmul_precision("default"):
        (line,) = products(vjp, cotangent)[OUT, IN]
    assert "precision = [HIGHEST, HIGHEST]" in line


def gradient_of_input_gradient(x, weight):
    def input_gradient(x, weight):
        return jax.grad(lambda x: jnp.sum(linear(x, weight, precision=THREE) ** 3))(x)

    return jax.grad(lambda w: jnp.sum(input_gradient(x, w).astype("float32") ** 2))(
        weight
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_derivatives_have_the_precision_of_the_product_they_come_from(
    dtype, platform
):
    x, weight, *_ = problem(dtype)
    found = products(gradient_of_input_gradient, x, weight, platform=platform)
    # Y = X Wᵀ, ∇X = G W, and the derivative of ∇X with respect to G.
    assert sum("[HIGHEST, HIGHEST]" in line for line in found[ROWS, OUT]) == 1
    assert sum("[HIGH, HIGH]" in line for line in found[ROWS, OUT]) == 1
    assert all("[HIGH, HIGH]" in line for line in found[ROWS, IN])
    # Those with respect to W, of ∇X and of Y.
    of_W = found.get((OUT, IN), []) + found.get((IN, OUT), [])
    assert sum("[HIGH, HIGH]" in line for line in of_W) == 1
    assert sum("[HIGHEST, HIGHEST]" in line for line in of_W) == 1


def test_precision_is_that_of_the_forward_product_in_plain_autodiff():
    layer = functools.partial(linear, precision=THREE)
    with jaxlinear.plain_autodiff():
        found = products(functools.partial(results, layer), *problem())
    lines = [line for lines in found.values() for line in lines]
    assert len(lines) == 3
    assert all("[HIGHEST, HIGHEST]" in line for line in lines)


# Algorithms of low precision that CPUs have, and the dtype in which they multiply.
ALGORITHMS = {"BF16_BF16_F32": "bfloat16", "F16_F16_F16": "float16"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_algorithms_of_low_precision_run_on_cpu_mapped_over_weights_too(
    dtype, algorithm
):
    # Where XLA folds a transpose into it, a plain product of bfloat16 fails on CPU.
    x, weight, bias, cotangent = random_problem((16, 2), 8, 6, dtype)
    layer = functools.partial(linear, precision=algorithm)
    multiplied = ALGORITHMS[algorithm]
    operands = [a.astype(multiplied).astype(dtype) for a in (x, weight)]
    for mapped in (False, True):
        function = functools.partial(results, layer)
        arguments = x, weight, bias, cotangent
        if mapped:
            function = jax.vmap(function, (None, 2, None, None), -1)
            arguments = x, jnp.stack([weight] * 3, 2), bias, cotangent
        actual = jax.jit(function)(*arguments)
        expected = [
            *exact(*operands, bias, cotangent.astype(multiplied).astype(dtype))
        ][:3]
        # Of the products' operands, their sums and their results each is rounded once.
        tolerance = 4 * max(jnp.finfo(multiplied).eps, jnp.finfo(dtype).eps)
        for value, (want, _) in zip(actual, expected, strict=False):
            value = value[..., 0] if mapped else value
            assert relative_error(value, want) < tolerance


UNSUPPORTED = (
    r"^`precision` must be one of default, .*, highest, .*F32_F32_F32, .* for float32"
    r" on cpu, got TF32_TF32_F32(\n|$)"
)
UNSUPPORTED_PRECISIONS = {
    "all": "TF32_TF32_F32",
    "a preset": DotAlgorithmPreset.TF32_TF32_F32,
    "that of one gradient": Precision(weight_grad="TF32_TF32_F32"),
}


@pytest.mark.parametrize(
    "precision", UNSUPPORTED_PRECISIONS.values(), ids=UNSUPPORTED_PRECISIONS
)
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.grad], ids=["eager", "grad"])
def test_algorithm_that_the_device_does_not_have_is_refused(wrapped, precision):
    x, weight, *_ = problem()
    loss = wrapped(lambda w: jnp.sum(linear(x, w, precision=precision)))
    with pytest.raises(ValueError, match=UNSUPPORTED):
        loss(weight)


def test_algorithm_that_cpu_does_not_have_is_refused_by_jax_inside_jit():
    # For which platform a program will be lowered is not known while it is traced.
    x, weight, *_ = problem()
    with pytest.raises(ValueError, match=r"TF32_TF32_F32.* not supported .* CPU"):
        jax.jit(lambda x, w: linear(x, w, precision="TF32_TF32_F32"))(x, weight)


@pytest.mark.parametrize("precision", ["hihg", 3, Precision(weight_grad="hihg")])
@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_unknown_precision_is_refused_before_the_backward_pass(wrapped, precision):
    x, weight, *_ = problem()
    with pytest.raises(
        ValueError, match=r"^`precision` must be None, a jax.lax.Precision, .*, got "
    ):
        wrapped(lambda x, w: linear(x, w, precision=precision))(x, weight)


def test_modules_take_a_precision():
    from flax import nnx

    from jaxlinear import linen
    from jaxlinear.nnx import Linear

    x, *_ = problem()
    modules = (
        Linear(IN, OUT, precision=THREE, rngs=nnx.Rngs(0)),
        linen.Linear(OUT, precision=THREE).bind(
            linen.Linear(OUT).init(jax.random.key(0), x)
        ),
    )
    for module in modules:
        found = products(lambda x, module=module: jax.vjp(module, x)[1](module(x)), x)
        assert "[HIGHEST, HIGHEST]" in found[ROWS, OUT][0]
        assert "[HIGH, HIGH]" in found[ROWS, IN][0]
    for refused in (
        lambda: Linear(IN, OUT, precision="hihg", rngs=nnx.Rngs(0)),
        lambda: linen.Linear(OUT, precision="hihg").init(jax.random.key(0), x),
    ):
        with pytest.raises(ValueError, match="`precision` must be None, a"):
            refused()


def test_precision_changes_no_value_on_cpu():
    arguments = problem()
    expected = results(naive, *arguments)
    actual = results(functools.partial(linear, precision=THREE), *arguments)
    for value, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)
