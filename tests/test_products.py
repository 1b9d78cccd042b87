"""The products as each platform is given them: operands, result, and no failure."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from oracle import exact, naive, random_problem, relative_error, wide

from jaxlinear import _cpu, linear

each_form = pytest.mark.parametrize("form", _cpu.REASONS)


@pytest.mark.skipif(
    not pathlib.Path("/proc/cpuinfo").exists(), reason="needs Linux's list of features"
)
def test_bfloat16_instructions_are_those_that_the_system_lists():
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    listed = not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
    assert _cpu._has_bfloat16_instructions() is listed


@each_form
def test_values_are_right_whatever_the_form(form, use_form):
    use_form(form)
    x, weight, bias, cotangent = random_problem((64,), 48, 40, "bfloat16")
    Y, vjp = jax.vjp(jax.jit(linear), x, weight, bias)
    eps = float(jnp.finfo("bfloat16").eps)
    for ours, (expected, _) in zip(
        (Y, *vjp(cotangent)), exact(x, weight, bias, cotangent), strict=True
    ):
        assert relative_error(ours, expected) < eps


@pytest.mark.parametrize("form", [_cpu.SHARED, _cpu.WIDENED])
def test_long_sums_are_as_accurate_as_in_float32_without_bfloat16_instructions(
    form, use_form
):
    use_form(form)
    x, _, _, cotangent = random_problem((4096,), 512, 512, "bfloat16")
    weight = jnp.zeros((512, 512))
    _, vjp = jax.vjp(lambda w: linear(x, w, dtype="bfloat16"), weight)
    expected = wide(cotangent).T @ wide(x)
    in_float32 = jax.jit(lambda G, X: G.astype("float32").T @ X.astype("float32"))
    of_float32 = relative_error(in_float32(cotangent, x), expected)
    assert relative_error(vjp(cotangent)[0], expected) <= 1.01 * of_float32


@each_form
@pytest.mark.parametrize("precision", [None, "BF16_BF16_F32"])
@pytest.mark.parametrize("weight_axis", [None, 0, 2])
@pytest.mark.parametrize("x_axis", [None, 0, 2])
def test_transposed_gradients_in_mixed_precision(
    x_axis, weight_axis, precision, form, use_form
):
    use_form(form)
    # XLA's CPU backend folds the transpose into the product, and fails when it runs one
    # that takes bfloat16 operands and has a float32 result.
    x, weight, _, _ = random_problem((2, 3), 8, 2, "float32")
    if x_axis is not None:
        x = jnp.stack([x, -x], x_axis)
    if weight_axis is not None:
        weight = jnp.stack([weight, 2 * weight], weight_axis)

    def gradients(layer):
        def loss(x, weight):
            Y = layer(x, weight, dtype="bfloat16")
            return jnp.sum(Y.astype("float32") ** 2)

        def transposed(x, weight):
            return [gradient.T for gradient in jax.grad(loss, (0, 1))(x, weight)]

        axes = x_axis, weight_axis
        return jax.jit(
            transposed if axes == (None, None) else jax.vmap(transposed, axes)
        )

    # The two differ by their roundings, a few of half a bfloat16 eps each.
    tolerance = 4 * float(jnp.finfo("bfloat16").eps)
    layer = functools.partial(linear, precision=precision)
    for ours, expected in zip(
        gradients(layer)(x, weight), gradients(naive)(x, weight), strict=True
    ):
        assert relative_error(ours, wide(expected)) < tolerance


@each_form
@pytest.mark.parametrize("weight_is_transposed", [False, True])
def test_a_transposed_operand_that_is_cast_in_another_function(
    weight_is_transposed, form, use_form
):
    use_form(form)
    # XLA folds the transpose into the product later than where there is one function.
    x, weight, _, _ = random_problem((8,), 16, 4, "float32")
    inner = jax.jit(functools.partial(linear, dtype="bfloat16"))

    @jax.jit
    def layer(x_transposed, weight):
        weight = weight.T if weight_is_transposed else weight
        return inner(x_transposed.T, weight)

    Y = layer(x.T, weight.T if weight_is_transposed else weight)
    expected = wide(x) @ wide(weight).T
    assert relative_error(Y, expected) < 2 * float(jnp.finfo("bfloat16").eps)


@each_form
@pytest.mark.parametrize("leading", [(64,), (4, 16)], ids=str)
def test_weight_gradient_of_many_more_outputs_than_inputs(leading, form, use_form):
    use_form(form)
    # On CPU it is the transposed product of the swapped operands, or that of rows.
    x, weight, _, cotangent = random_problem(leading, 8, 32, "bfloat16")
    (gradient,) = jax.vjp(lambda weight: linear(x, weight), weight)[1](cotangent)
    expected = wide(cotangent).reshape(-1, 32).T @ wide(x).reshape(-1, 8)
    assert relative_error(gradient, expected) < float(jnp.finfo("bfloat16").eps)


def product_types(function, *arguments, platform):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    products = re.findall(
        r"stablehlo.dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)"
        r" -> tensor<\S*x(\w+)>",
        lowered.as_text(),
    )
    return [" ".join(types) for types in products]


# dtype of x and weight, with a bias, reduce_dtype: operands and result of the forward
# product, the input gradient and the weight gradient. None: Y is rounded once the bias
# is added, but for GPUs before.
PRODUCTS = {
    ("bfloat16", "bfloat16", True, None): [None, "bf16", "bf16"],
    ("bfloat16", "bfloat16", True, "float32"): ["f32", "f32", "f32"],
    ("bfloat16", "bfloat16", False, None): ["bf16", "bf16", "bf16"],
    ("bfloat16", "float32", True, None): [None, "bf16", "f32"],
    ("float32", "float32", False, None): ["bf16", "f32", "f32"],
    ("float32", "float32", True, "bfloat16"): ["bf16", "bf16", "bf16"],
    ("bfloat16", "bfloat16", False, "float32"): ["f32", "f32", "f32"],
}


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_accelerators_multiply_in_bfloat16_and_round_where_it_is_free(case, platform):
    x_dtype, parameter_dtype, has_bias, reduce_dtype = case
    x, _, _, cotangent = random_problem((5,), 4, 3, x_dtype)
    _, weight, bias, _ = random_problem((5,), 4, 3, parameter_dtype)
    parameters = (weight, bias) if has_bias else (weight,)

    def gradients(x, *parameters):
        layer = functools.partial(linear, dtype="bfloat16", reduce_dtype=reduce_dtype)
        Y, vjp = jax.vjp(layer, x, *parameters)
        return Y, vjp(cotangent.astype("bfloat16"))

    types = product_types(gradients, x, *parameters, platform=platform)
    default = "f32" if platform == "tpu" else "bf16"
    assert types == [f"bf16 bf16 {result or default}" for result in PRODUCTS[case]]


@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
def test_weight_gradient_is_rounded_to_the_dtype_in_which_it_is_reduced(reduce_dtype):
    x, weight, _, cotangent = random_problem((64,), 8, 4, "float32")
    layer = functools.partial(linear, x, dtype="bfloat16", reduce_dtype=reduce_dtype)
    (gradient,) = jax.vjp(layer, weight)[1](cotangent.astype("bfloat16"))
    rounded = gradient.astype("bfloat16").astype("float32")
    assert gradient.dtype == "float32"
    assert bool(jnp.all(gradient == rounded)) is (reduce_dtype == "bfloat16")
