"""The values of the naive formula under JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from oracle import naive, random_array, random_problem, relative_error, wide

from jaxlinear import linear

DTYPES = {"float32": None, "mixed": "bfloat16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True, params=[True, False], ids=["leak-checks", "caches"])
def leak_checking(request):
    """Each test twice: looking for leaks turns off caches that users have."""
    with jax.check_tracer_leaks(request.param):
        yield


def squares(layer, dtype):
    """A loss with a second derivative."""

    def loss(x, weight, bias):
        return jnp.sum(layer(x, weight, bias, dtype=dtype).astype("float32") ** 2)

    return loss


def assert_as_naive(transformed, *arguments, dtype):
    """``transformed(layer)`` has the same values for our layer and the naive one.

    Under bfloat16 compute the two differ by their roundings, a few units of 2^-8.
    """
    tolerance = 1e-5 if dtype is None else 4 * float(jnp.finfo(dtype).eps)
    actual = jax.tree.leaves(transformed(linear)(*arguments))
    expected = jax.tree.leaves(transformed(naive)(*arguments))
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
        assert relative_error(ours, wide(reference)) < tolerance


@each_dtype
@pytest.mark.parametrize("outer", [jax.jit, jax.checkpoint, lambda f: f])
def test_gradients_under_jit_and_checkpoint(outer, dtype):
    *arguments, _ = random_problem((5,), 4, 3, "float32")
    assert_as_naive(
        lambda layer: jax.grad(outer(squares(layer, dtype)), (0, 1, 2)),
        *arguments,
        dtype=dtype,
    )


@each_dtype
def test_second_derivatives_in_reverse_mode(dtype):
    *arguments, _ = random_problem((3,), 3, 2, "float32")
    assert_as_naive(
        lambda layer: jax.jacrev(jax.grad(squares(layer, dtype), (0, 1, 2)), (0, 1, 2)),
        *arguments,
        dtype=dtype,
    )


@each_dtype
def test_forward_over_reverse(dtype):
    x, weight, bias, _ = random_problem((3,), 3, 2, "float32")

    def transformed(layer):
        def hessian_and_its_product(weight, tangent):
            def loss(weight):
                return squares(layer, dtype)(x, weight, bias)

            product = jax.jvp(jax.grad(loss), (weight,), (tangent,))[1]
            return jax.hessian(loss)(weight), product

        return hessian_and_its_product

    assert_as_naive(transformed, weight, jnp.sin(weight), dtype=dtype)


@each_dtype
@pytest.mark.parametrize(
    "in_axes",
    [
        (0, None, None),
        (None, 0, None),
        (None, None, 0),
        (1, 2, 1),
        (0, 1, None),
        (None, -1, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_vmap_over_each_argument(in_axes, gradient, dtype):
    def batched(argument, axis, seed):
        if axis is None:
            return argument
        stacked = [
            argument + random_array((seed, i), argument.shape, "float32")
            for i in range(3)
        ]
        return jnp.stack(stacked, axis)

    *arguments, _ = random_problem((5,), 4, 3, "float32")
    arguments = map(batched, arguments, in_axes, range(3))

    def transformed(layer):
        function = functools.partial(layer, dtype=dtype)
        if gradient:
            function = jax.grad(squares(layer, dtype), (0, 1, 2))
        return jax.vmap(function, in_axes)

    assert_as_naive(transformed, *arguments, dtype=dtype)


@pytest.mark.parametrize("weight_axis", [None, 0, 2])
@pytest.mark.parametrize("x_axis", [0, 2])
def test_transposed_gradients_in_mixed_precision(x_axis, weight_axis):
    # XLA's CPU backend folds the transpose into the product, and fails when it runs one
    # that takes bfloat16 operands and has a float32 result.
    x, weight, _, _ = random_problem((2, 3), 8, 2, "float32")
    x = jnp.stack([x, -x], x_axis)
    if weight_axis is not None:
        weight = jnp.stack([weight, 2 * weight], weight_axis)

    def transformed(layer):
        def transposed_gradients(x, weight):
            grads = jax.grad(squares(layer, "bfloat16"), (0, 1))(x, weight, None)
            return [g.T for g in grads]

        return jax.jit(jax.vmap(transposed_gradients, (x_axis, weight_axis)))

    assert_as_naive(transformed, x, weight, dtype="bfloat16")


@each_dtype
def test_gradient_of_vmap_over_weights(dtype):
    x, weight, bias, _ = random_problem((5,), 4, 3, "float32")
    weights = jnp.stack([weight, 2 * weight, 3 * weight])

    def transformed(layer):
        def loss(x, weights, bias):
            return jnp.sum(
                jax.vmap(squares(layer, dtype), (None, 0, None))(x, weights, bias)
            )

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    assert_as_naive(transformed, x, weights, bias, dtype=dtype)


@each_dtype
def test_gradient_through_a_scan_over_stacked_layers(dtype):
    x, weight, bias, _ = random_problem((5,), 4, 4, "float32")
    weights, biases = jnp.stack([weight, -weight]) / 4, jnp.stack([bias, 2 * bias])

    def transformed(layer):
        def loss(x, weights, biases):
            def step(x, parameters):
                return jnp.tanh(layer(x, *parameters, dtype=dtype)).astype(
                    x.dtype
                ), None

            return jnp.sum(lax.scan(step, x, (weights, biases))[0] ** 2)

        return jax.grad(loss, (0, 1, 2))

    assert_as_naive(transformed, x, weights, biases, dtype=dtype)


def test_gradient_through_a_scan_that_carries_a_bfloat16_weight():
    # A cotangent in another dtype than the weight's passes everywhere but here.
    x, weight, bias, _ = random_problem((5,), 4, 4, "bfloat16")

    def transformed(layer):
        def loss(x, weight, bias):
            def step(carry, _):
                x, weight = carry
                return (jnp.tanh(layer(x, weight, bias)), weight), None

            (x, _), _ = lax.scan(step, (x, weight), length=3)
            return jnp.sum(x.astype("float32") ** 2)

        return jax.grad(loss, (0, 1, 2))

    assert_as_naive(transformed, x, weight, bias, dtype="bfloat16")


@each_dtype
@pytest.mark.parametrize("chosen", [True, False])
def test_gradient_through_a_cond_with_the_layer_in_one_branch(chosen, dtype):
    *arguments, _ = random_problem((5,), 4, 4, "float32")

    def transformed(layer):
        def loss(x, weight, bias):
            def apply(x):
                return layer(x, weight, bias, dtype=dtype).astype("float32")

            return jnp.sum(lax.cond(chosen, apply, jnp.sin, x) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    assert_as_naive(transformed, *arguments, dtype=dtype)


@each_dtype
def test_gradient_where_only_one_of_two_results_is_used(dtype):
    *arguments, _ = random_problem((5,), 4, 3, "float32")

    def transformed(layer):
        @jax.jit
        def two_results(x, weight, bias):
            return layer(x, weight, bias, dtype=dtype), jnp.sum(x**2)

        return jax.grad(lambda *a: two_results(*a)[1], (0, 1, 2))

    for ours, reference in zip(
        transformed(linear)(*arguments), transformed(naive)(*arguments), strict=True
    ):
        np.testing.assert_array_equal(ours, reference)


@each_dtype
def test_export_for_every_platform_with_a_symbolic_batch(dtype):
    x, weight, bias, _ = random_problem((5,), 4, 3, "float32")
    (batch,) = export.symbolic_shape("batch")
    specifications = [
        jax.ShapeDtypeStruct((batch, 4), x.dtype),
        jax.ShapeDtypeStruct(weight.shape, weight.dtype),
        jax.ShapeDtypeStruct(bias.shape, bias.dtype),
    ]

    def transformed(layer):
        function = jax.value_and_grad(squares(layer, dtype), (0, 1, 2))
        exported = export.export(
            jax.jit(function), platforms=("cpu", "cuda", "rocm", "tpu")
        )(*specifications)
        return export.deserialize(exported.serialize()).call

    assert_as_naive(transformed, x, weight, bias, dtype=dtype)


def test_gradient_of_an_exported_function_is_ours():
    x, weight, bias, cotangent = random_problem((5,), 4, 3, "float32")
    exported = export.export(jax.jit(linear))(x, weight, bias)
    restored = export.deserialize(exported.serialize(vjp_order=1))
    _, vjp = jax.vjp(restored.call, x, weight, bias)
    _, reference = jax.vjp(linear, x, weight, bias)
    for actual, expected in zip(vjp(cotangent), reference(cotangent), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_shapes_and_programs_ahead_of_time():
    arguments = random_problem((2, 5), 4, 3, "float32")[:3]
    assert jax.eval_shape(linear, *arguments).shape == (2, 5, 3)
    in_bfloat16 = functools.partial(linear, dtype="bfloat16")
    compiled = jax.jit(in_bfloat16).lower(*arguments).compile()
    expected = in_bfloat16(*arguments)
    np.testing.assert_array_equal(compiled(*arguments), expected)


def test_forward_mode_of_the_layer_itself_is_refused_by_jax():
    x, weight, _, _ = random_problem((5,), 4, 3, "float32")
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\).*custom_vjp"):
        jax.jvp(lambda w: linear(x, w), (weight,), (weight,))


def product_types(function, *arguments, platform):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    products = re.findall(
        r"stablehlo.dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)"
        r" -> tensor<\S*x(\w+)>",
        lowered.as_text(),
    )
    return [" ".join(types) for types in products]


# dtype of x and weight, with a bias, reduce_dtype: operands and result of the forward
# product, the input gradient and the weight gradient
PRODUCTS = {
    ("bfloat16", "bfloat16", True, None): ["f32", "bf16", "bf16"],
    ("bfloat16", "bfloat16", False, None): ["bf16", "bf16", "bf16"],
    ("bfloat16", "float32", True, None): ["f32", "bf16", "f32"],
    ("float32", "float32", False, None): ["bf16", "f32", "f32"],
    ("float32", "float32", True, "bfloat16"): ["bf16", "bf16", "bf16"],
    ("bfloat16", "bfloat16", False, "float32"): ["f32", "f32", "f32"],
}


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_accelerators_multiply_in_bfloat16_and_round_once(case, platform):
    x_dtype, parameter_dtype, has_bias, reduce_dtype = case
    x, _, _, cotangent = random_problem((5,), 4, 3, x_dtype)
    _, weight, bias, _ = random_problem((5,), 4, 3, parameter_dtype)
    parameters = (weight, bias) if has_bias else (weight,)

    def gradients(x, *parameters):
        layer = functools.partial(linear, dtype="bfloat16", reduce_dtype=reduce_dtype)
        Y, vjp = jax.vjp(layer, x, *parameters)
        return Y, vjp(cotangent.astype("bfloat16"))

    types = product_types(gradients, x, *parameters, platform=platform)
    assert types == [f"bf16 bf16 {result}" for result in PRODUCTS[case]]


@pytest.mark.parametrize("reduce_dtype", ["bfloat16", "float32"])
def test_weight_gradient_is_rounded_to_the_dtype_in_which_it_is_reduced(reduce_dtype):
    x, weight, _, cotangent = random_problem((64,), 8, 4, "float32")
    layer = functools.partial(linear, x, dtype="bfloat16", reduce_dtype=reduce_dtype)
    (gradient,) = jax.vjp(layer, weight)[1](cotangent.astype("bfloat16"))
    rounded = gradient.astype("bfloat16").astype("float32")
    assert gradient.dtype == "float32"
    assert bool(jnp.all(gradient == rounded)) is (reduce_dtype == "bfloat16")
