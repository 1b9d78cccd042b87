"""What the table of transformations (`test_table.py`) does not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import naive, random_problem, relative_error, wide

from jaxlinear import linear


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_through_a_scan_that_carries_a_bfloat16_weight(dtype):
    # A cotangent in another dtype than the weight's passes everywhere but here.
    *arguments, _ = random_problem((5,), 4, 4, "bfloat16")

    def gradients(layer):
        def loss(x, weight, bias):
            def step(carry, _):
                x, weight = carry
                Y = layer(x, weight, bias, dtype=dtype)
                return (jnp.tanh(Y).astype(x.dtype), weight), None

            (x, _), _ = lax.scan(step, (x, weight), length=3)
            return jnp.sum(x.astype("float32") ** 2)

        return jax.grad(loss, (0, 1, 2))(*arguments)

    tolerance = 4 * float(jnp.finfo("bfloat16").eps)
    for ours, expected in zip(gradients(linear), gradients(naive), strict=True):
        assert ours.dtype == "bfloat16"
        assert relative_error(ours, wide(expected)) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_where_only_one_of_two_results_is_used(dtype):
    *arguments, _ = random_problem((5,), 4, 3, "float32")

    def gradients(layer):
        @jax.jit
        def two_results(x, weight, bias):
            return layer(x, weight, bias, dtype=dtype), jnp.sum(x**2)

        return jax.grad(lambda *a: two_results(*a)[1], (0, 1, 2))(*arguments)

    for ours, expected in zip(gradients(linear), gradients(naive), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_leak_checking_inside_shard_map():
    x, weight, bias, _ = random_problem((8,), 4, 2, "float32")

    def loss(x, weight, bias):
        return jnp.sum(linear(x, weight, bias) ** 2)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.P("data"), jax.P()
    mapped = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(data, whole, whole), out_specs=data
    )
    with jax.check_tracer_leaks(True):
        actual = jax.jit(mapped)(x, weight, bias)
    np.testing.assert_allclose(actual, 2 * naive(x, weight, bias) @ weight, rtol=1e-5)
