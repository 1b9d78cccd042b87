"""Explicit meshes and shard_map: the types and values of the naive formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import naive, random_problem, relative_error, wide

from jaxlinear import linear

DTYPES = {"float32": None, "mixed": "bfloat16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def problem():
    *arguments, _ = random_problem((8, 4), 16, 12, "float32")
    return arguments


def squares(layer, **options):
    def loss(*arguments):
        return jnp.sum(layer(*arguments, **options).astype("float32") ** 2)

    return loss


def assert_close(ours, reference, dtype):
    tolerance = 1e-5 if dtype is None else 4 * float(jnp.finfo(dtype).eps)
    for actual, expected in zip(ours, reference, strict=True):
        assert relative_error(actual, wide(expected)) < tolerance


# name: specs of x, weight and bias, and out_sharding
LAYOUTS = {
    "replicated": (P(), P(), P(), None),
    "data": (P("data"), P(), P(), None),
    "column": (P("data"), P("model"), P("model"), None),
    "row": (P("data", None, "model"), P(None, "model"), P(), P("data", None, None)),
    "fsdp": (P("data"), P(None, "data"), P(), P("data", None, None)),
    "output": (P("data"), P(), P(), P("data", None, "model")),
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_explicit_mesh_gives_gradients_of_the_types_and_values_of_autodiff(
    layout, dtype
):
    *specs, out_sharding = layout
    with jax.set_mesh(mesh(AxisType.Explicit)):
        arguments = list(map(jax.device_put, problem(), specs))

        def gradients(layer):
            loss = squares(layer, dtype=dtype, out_sharding=out_sharding)
            return jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)

        ours, reference = gradients(linear), gradients(naive)
    assert [jax.typeof(g) for g in ours] == [jax.typeof(g) for g in reference]
    assert_close(ours, reference, dtype)


@each_dtype
def test_explicit_mesh_accepts_parameters_made_before_the_mesh_was_set(dtype):
    x, weight, bias = problem()
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(x, P("data"))
        grad = jax.jit(jax.grad(squares(linear, dtype=dtype), (0, 1, 2)))(
            x, weight, bias
        )
        want = jax.jit(jax.grad(squares(naive, dtype=dtype), (0, 1, 2)))(
            x, weight, bias
        )
    assert_close(grad, want, dtype)


def test_explicit_mesh_needs_no_context_where_the_arrays_carry_it():
    explicit = mesh(AxisType.Explicit)
    x, weight, bias = problem()
    x = jax.device_put(x, NamedSharding(explicit, P("data")))
    weight, bias = jax.device_put((weight, bias), NamedSharding(explicit, P()))
    grad = jax.jit(jax.grad(squares(linear), (0, 1, 2)))(x, weight, bias)
    assert grad[0].sharding.spec == P("data", None, None)
    assert_close(grad, jax.grad(squares(naive), (0, 1, 2))(*problem()), None)


# name: specs of x, weight, bias and the output, and the axes to sum the output over
MANUAL = {
    "data": (P("data"), P(), P(), P("data")),
    "column": (P(), P("model"), P("model"), P(None, None, "model")),
    "data-tensor": (P("data"), P("model"), P("model"), P("data", None, "model")),
}


@each_dtype
@pytest.mark.parametrize("layout", MANUAL.values(), ids=MANUAL)
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no-vma"])
def test_shard_map_has_the_gradients_of_the_naive_formula_outside(
    layout, check_vma, dtype
):
    *in_specs, out_specs = layout

    def gradients(layer):
        mapped = jax.shard_map(
            functools.partial(layer, dtype=dtype),
            mesh=mesh(AxisType.Auto),
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            check_vma=check_vma,
        )
        return jax.jit(jax.grad(squares(mapped), (0, 1, 2)))(*problem())

    assert_close(gradients(linear), gradients(naive), dtype)


@each_dtype
@pytest.mark.parametrize("layout", MANUAL.values(), ids=MANUAL)
def test_shard_map_has_the_gradients_of_the_naive_formula_inside(layout, dtype):
    *in_specs, _ = layout

    def gradients(layer):
        mapped = jax.shard_map(
            jax.grad(squares(layer, dtype=dtype), (0, 1, 2)),
            mesh=mesh(AxisType.Auto),
            in_specs=tuple(in_specs),
            out_specs=tuple(in_specs),
        )
        return jax.jit(mapped)(*problem())

    assert_close(gradients(linear), gradients(naive), dtype)


@each_dtype
def test_shard_map_over_contracted_features_needs_the_sum_that_autodiff_needs(dtype):
    def gradients(layer):
        def row_parallel(x, weight, bias):
            product = layer(x, weight, dtype=dtype).astype("float32")
            return jax.lax.psum(product, "model") + jnp.expand_dims(bias, (0, 1))

        mapped = jax.shard_map(
            row_parallel,
            mesh=mesh(AxisType.Auto),
            in_specs=(P("data", None, "model"), P(None, "model"), P()),
            out_specs=P("data"),
        )
        return jax.jit(jax.grad(squares(mapped), (0, 1, 2)))(*problem())

    # JAX's own psum is reported as a leak here, with the naive formula too.
    with jax.check_tracer_leaks(False):
        assert_close(gradients(linear), gradients(naive), dtype)


def test_unchecked_shard_map_leaves_the_weight_gradient_of_each_device_unsummed():
    # JAX's convention: without check_vma nothing is summed that nobody asked for.
    def gradients(layer):
        mapped = jax.shard_map(
            lambda x, w, b: jax.grad(squares(layer), 1)(x, w, b)[None],
            mesh=mesh(AxisType.Auto),
            in_specs=(P("data"), P(), P()),
            out_specs=P("data"),
            check_vma=False,
        )
        return jax.jit(mapped)(*problem())

    ours = gradients(linear)
    assert ours.shape == (4, 12, 16)
    np.testing.assert_allclose(ours, gradients(naive), rtol=1e-4, atol=1e-4)
