"""Explicit meshes and arrays that were made without them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import naive, random_problem, relative_error, wide

from jaxlinear import linear


def explicit_mesh():
    axis_types = (AxisType.Explicit,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=axis_types)


def problem():
    return random_problem((8, 4), 16, 12, "float32")[:3]


def gradients(layer, *arguments, dtype=None):
    def loss(*arguments):
        return jnp.sum(layer(*arguments, dtype=dtype).astype("float32") ** 2)

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)


def assert_close(ours, reference, dtype):
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for actual, expected in zip(ours, reference, strict=True):
        assert relative_error(actual, wide(expected)) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explicit_mesh_accepts_parameters_made_before_the_mesh_was_set(dtype):
    x, *parameters = problem()
    with jax.set_mesh(explicit_mesh()):
        x = jax.device_put(x, P("data"))
        ours = gradients(linear, x, *parameters, dtype=dtype)
        reference = gradients(naive, x, *parameters, dtype=dtype)
    assert_close(ours, reference, dtype)


def test_explicit_mesh_needs_no_context_where_the_arrays_carry_it():
    mesh = explicit_mesh()
    x, *parameters = problem()
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    parameters = jax.device_put(parameters, NamedSharding(mesh, P()))
    ours = gradients(linear, x, *parameters)
    assert ours[0].sharding.spec == P("data", None, None)
    assert_close(ours, gradients(naive, *problem()), "float32")
