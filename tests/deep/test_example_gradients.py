"""Gradients of single examples in models of every kind, in every mode, on devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from example_models import (
    OTHER,
    checkpointed,
    drawn,
    gradients,
    layer,
    mean_square,
    of_mlp,
    of_scan,
    returning,
    squared_norms,
)
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_example_gradients import check_close, check_model

from jaxlinear import clipped_grad, linear, squared_grad_norms


@pytest.mark.parametrize("name", OTHER)
def test_gradients_are_those_of_vmap_of_grad(name):
    check_model(name)


def results(parameters, x, loss, passes):
    grad = clipped_grad(loss, l2_clip_norm=0.1, passes=passes, return_grad_norms=True)
    return grad(parameters, x)


BATCH_AND_WEIGHTS = {
    "data": (P("data"), P()),
    "fully sharded": (P(("data", "model")), P(("data", "model"))),
    "tensor": (P("data"), P("model")),
    "features": (P("data"), P(None, "model")),
}


KINDS = [(AxisType.Auto, split) for split in BATCH_AND_WEIGHTS]
KINDS += [  # Fully sharded weights must be gathered there, in any loss.
    (AxisType.Explicit, split)
    for split in BATCH_AND_WEIGHTS
    if split != "fully sharded"
]


@pytest.mark.parametrize(("kind", "split"), KINDS)
@pytest.mark.parametrize("passes", [1, 2])
def test_examples_are_those_of_all_devices(kind, split, passes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    of_batch, of_weights = BATCH_AND_WEIGHTS[split]
    weight, x = drawn(16, 8), drawn(16, 3, 8, scale=1)
    expected = jax.jit(results, static_argnums=(2, 3))(
        weight, x, square_of_layer, passes
    )
    with jax.set_mesh(mesh):
        arrays = (
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in ((weight, of_weights), (x, of_batch))
        )
        found = jax.jit(results, static_argnums=(2, 3))(
            *arrays, square_of_layer, passes
        )
    check_close(found, expected, 2e-6, 0)


def square_of_layer(weight, x):
    return mean_square(jnp.tanh(linear(x, weight)))


@pytest.mark.parametrize("passes", [1, 2])
def test_kernels_on_a_mesh_with_explicit_axes(passes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    kernel, x = drawn(8, 16), drawn(16, 3, 8, scale=1)
    found = jax.jit(results, static_argnums=(2, 3))
    expected = found(kernel, x, square_of_product, passes)
    with jax.set_mesh(mesh):
        kernel = jax.device_put(kernel, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        found = found(kernel, x, square_of_product, passes)
    check_close(found, expected, 2e-6, 0)


def square_of_product(kernel, x):
    return mean_square(jnp.tanh(x @ kernel))


@pytest.mark.parametrize("passes", [1, 2])
def test_a_weight_that_devices_have_parts_of_has_the_norm_of_the_whole(passes):
    """Column- and row-parallel layers inside `shard_map`, with data parallelism."""

    def loss(parameters, x):
        up, down, bias = parameters
        y = linear(jnp.tanh(linear(x, up)), down)
        if jax.typeof(up).manual_axis_type.varying:
            y = lax.psum(y, "model")
        return mean_square(y + jnp.expand_dims(bias, range(y.ndim - 1)))

    parameters = drawn(16, 8), drawn(4, 16), drawn(4)
    x = drawn(8, 3, 8, scale=1)
    expected, examples = jax.jit(results, static_argnums=(2, 3))(
        parameters, x, loss, passes
    )

    def on_device(parameters, x):
        found, examples = results(parameters, x, loss, passes)
        return found, examples.grad_norms

    specs = (P("model"), P(None, "model"), P())
    found, norms = jax.jit(
        jax.shard_map(
            on_device,
            mesh=jax.make_mesh(
                (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
            ),
            in_specs=(specs, P("data")),
            out_specs=(specs, P("data")),
        )
    )(parameters, x)
    check_close(norms, examples.grad_norms, 2e-6, 0)
    check_close(found, expected, 2e-6, 0)


def test_a_stack_needs_no_memory_for_weight_gradients_of_examples():
    layers, width, examples = 4, 256, 32
    parameters = drawn(layers, width, width), drawn(layers, width)
    x = drawn(examples, 8, width)

    def temporaries(function):
        program = jax.jit(function).lower(parameters, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    for step in layer, checkpointed, returning:
        loss, _, _ = of_scan(step)
        found = temporaries(squared_grad_norms(loss))
        every = temporaries(lambda p, x, loss=loss: gradients(loss, p, (x,)))
        assert found < every / 2
        assert found < 1.5 * temporaries(jax.grad(loss))


def test_norms_have_gradients_and_a_second_batch_axis():
    loss, parameters, _ = of_mlp(2)
    x = drawn(3, 5, 2, 8, scale=1)

    def total(norms, parameters, x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(norms(parameters, x)))

    ours = functools.partial(total, squared_grad_norms(loss))
    naive = functools.partial(
        total, lambda p, x: squared_norms(gradients(loss, p, (x,)))
    )
    found, expected = (
        jax.jit(jax.vmap(jax.grad(f), (None, 0)))(parameters, x) for f in (ours, naive)
    )
    check_close(found, expected, 1e-5, 0)


def test_without_jit_it_is_the_same():
    loss, parameters, batch = of_scan()
    grad = clipped_grad(loss, l2_clip_norm=0.1)
    check_close(grad(parameters, *batch), jax.jit(grad)(parameters, *batch), 1e-6, 0)


def test_adaptive_bound_is_a_traced_number():
    loss, parameters, (x,) = of_mlp()

    @jax.jit
    def found(bound):
        return clipped_grad(loss, l2_clip_norm=bound)(parameters, x)

    for bound in 0.05, 0.5:
        expected = clipped_grad(loss, l2_clip_norm=bound)(parameters, x)
        check_close(found(bound), expected, 1e-6, 0)


def test_float64():
    with jax.enable_x64(True):
        loss = square_of_layer
        weight, x = (a.astype("float64") for a in (drawn(4, 8), drawn(5, 3, 8)))
        found = squared_grad_norms(loss)(weight, x)
        each = gradients(loss, weight, (x,))
        expected = jnp.sum(each**2, (1, 2))
        assert found.dtype == expected.dtype == "float64"
        check_float64 = jnp.max(jnp.abs(found - expected) / expected)
        assert check_float64 < 1e-7  # The loss is in float32.

        def both(parameters, x):
            return sum(loss(one, x.astype(one.dtype)) for one in parameters)

        parameters = weight, weight.astype("float32")
        grad = clipped_grad(both, l2_clip_norm=jnp.inf, return_grad_norms=True)
        _, examples = grad(parameters, x)
        assert examples.grad_norms.dtype == "float64"


def test_numbers_of_rows_may_have_fewer_bits_than_the_number_of_rows():
    def loss(table, numbers):
        axes = lax.GatherDimensionNumbers((2,), (0,), (0,))
        return jnp.sum(lax.gather(table, numbers[..., None], axes, (1, 8)))

    numbers = jnp.array([[200, 200, 3]], "uint8")
    norms = squared_grad_norms(loss)(drawn(300, 8), numbers)
    assert norms == 8 * (2**2 + 1)


def test_tokens_that_cancel_have_no_negative_norm():
    def loss(weight, x):
        y = linear(x, weight)
        return jnp.sum(y[:, ::2] - y[:, 1::2])

    x = jnp.repeat(drawn(64, 2, 64, scale=1), 2, axis=1)
    x = x.at[:, 1::2].multiply(1 + 1e-5)
    norms = squared_grad_norms(loss)(drawn(48, 64), x)
    assert jnp.all(norms >= 0)


def test_no_tracer_leaks():
    loss, parameters, batch = of_scan()
    with jax.checking_leaks():
        for passes in 1, 2:
            grad = clipped_grad(loss, l2_clip_norm=0.1, passes=passes)
            jax.jit(grad).lower(parameters, *batch)


def test_an_example_that_its_key_makes_nan_contributes_nothing():
    """Beside arrays of dtypes that have no sum, or none with Python's numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    bad = jax.random.uniform(keys[1])

    def loss(weight, x, key, is_token, digits):
        is_bad = jax.random.uniform(key[0]) == bad
        y = jnp.where(is_token[..., None], linear(x, weight), 0.0)
        y *= digits.astype("float32")[..., None]
        return mean_square(y) * jnp.where(is_bad, jnp.nan, 1.0)

    weight, x = drawn(3, 8), drawn(4, 8, scale=1)
    batch = x, keys, jnp.ones(4, bool), jnp.ones(4, "int4")
    rest = jax.tree.map(lambda a: a[jnp.array([0, 2, 3])], batch)
    for passes in 1, 2:
        grad = clipped_grad(
            loss, l2_clip_norm=0.1, batch_argnums=(1, 2, 3, 4), passes=passes
        )
        check_close(grad(weight, *batch), grad(weight, *rest), 1e-6, 0)


# Beside jax-privacy.


@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
def test_results_are_those_of_jax_privacy():
    clipping = pytest.importorskip("jax_privacy.clipping")
    loss, parameters, (x,) = of_mlp(4)
    x = x.at[1, 0, 0].set(jnp.nan)
    options = {
        "l2_clip_norm": 0.1,
        "normalize_by": 5.0,
        "return_values": True,
        "return_grad_norms": True,
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        peer = clipping.clipped_grad(loss, **options)(parameters, x)
    for passes in 1, 2:
        found, examples = clipped_grad(loss, passes=passes, **options)(parameters, x)
        is_finite = jnp.isfinite(examples.grad_norms)
        assert is_finite.sum() == 4
        for name in "values", "grad_norms":
            one, other = getattr(examples, name), getattr(peer[1], name)
            check_close(one[is_finite], other[is_finite], 2e-6, 0)
    for name, example in EXAMPLES_OF_JAX_PRIVACY.items():
        fun, arguments, options = example
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected = clipping.clipped_grad(fun, **options)(*arguments)
            for passes in 1, 2:
                found = clipped_grad(fun, passes=passes, **options)(*arguments)
                assert jnp.allclose(found, expected), name


def half_mean_square(parameter, data):
    return 0.5 * jnp.mean((data - parameter) ** 2)


EXAMPLES_OF_JAX_PRIVACY = {
    "numbers": (
        half_mean_square,
        (3.0, jnp.array([0, 7, -2])),
        {"l2_clip_norm": jnp.inf},
    ),
    "clipped": (half_mean_square, (3.0, jnp.array([0, 7, -2])), {"l2_clip_norm": 1.0}),
    "groups": (
        half_mean_square,
        (3.0, jnp.array([[1, -1], [2, 2], [0, 3]])),
        {"l2_clip_norm": jnp.inf, "keep_batch_dim": False},
    ),
}
