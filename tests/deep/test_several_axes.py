"""The layer over several axes where Flax has LinearGeneral and DenseGeneral."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import NEWER_EMITTERS
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import random_array, relative_error, wide

import jaxlinear.linen
from jaxlinear import linear
from jaxlinear.nnx import Linear

EPS = float(jnp.finfo("float32").eps)

# Input features, output features, the axes, and the shape of an input.
CASES = {
    "query": (8, (2, 3), -1, (4, 5, 8)),
    "out": ((2, 3), 8, (-2, -1), (4, 5, 2, 3)),
    "both": ((2, 3), (4, 2), (-2, -1), (5, 2, 3)),
    "one of each in a tuple": ((6,), (4,), (-1,), (5, 6)),
    "axes that are not the last": ((2, 3), 4, (1, -1), (5, 2, 7, 3)),
    "axes that Flax sorts": ((2, 3), 4, (-1, 1), (5, 2, 7, 3)),
    "the first axis": (5, 4, 0, (5, 2)),
    "no leading axes": ((2, 3), (4, 2), (0, 1), (2, 3)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def count_of(axes):
    return len(axes) if isinstance(axes, tuple) else 1


def nnx_layers(case, **options):
    """Ours, and Flax's with the same parameters."""
    ins, outs, axis, _ = case
    ours = Linear(ins, outs, axis=axis, rngs=nnx.Rngs(0), **options)
    flax = nnx.LinearGeneral(ins, outs, axis=axis, rngs=nnx.Rngs(0), **options)
    count = count_of(axis)
    kernel = jnp.moveaxis(ours.weight[...], range(-count, 0), range(count))
    flax.kernel.set_value(kernel)
    flax.bias.set_value(ours.bias[...])
    return ours, flax


def output_and_gradients(layer, x, cotangent, weight):
    graph, parameters = nnx.split(layer)
    y, vjp = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), parameters, x)
    of_parameters, of_x = vjp(cotangent.astype(y.dtype))
    return y, of_x, of_parameters[weight][...], of_parameters["bias"][...]


@each_case
def test_values_and_gradients_are_those_of_linear_general(case):
    *_, axis, shape = case
    ours, flax = nnx_layers(case)
    x = random_array(1, shape, "float32")
    cotangent = random_array(2, flax(x).shape, "float32")
    mine = output_and_gradients(ours, x, cotangent, "weight")
    theirs = output_and_gradients(flax, x, cotangent, "kernel")
    count = count_of(axis)
    of_kernel = np.moveaxis(wide(theirs[2]), range(count), range(-count, 0))
    for value, expected in zip(mine, (*theirs[:2], of_kernel, theirs[3]), strict=True):
        assert value.shape == expected.shape
        assert relative_error(value, wide(expected)) <= 8 * EPS


@each_case
def test_the_linen_layer_is_dense_general(case):
    _, outs, axis, shape = case
    x = random_array(1, shape, "float32")
    ours, flax = jaxlinear.linen.Linear(outs, axis=axis), nn.DenseGeneral(outs, axis)
    theirs = flax.init(jax.random.key(0), x)
    paths = {"": (count_of(axis), count_of(outs))}
    mine = jaxlinear.linen.convert_tree(theirs["params"], paths)
    shapes = jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(jnp.shape, mine)
    y, expected = ours.apply({"params": mine}, x), flax.apply(theirs, x)
    assert y.shape == expected.shape
    assert relative_error(y, wide(expected)) <= 8 * EPS


def test_weight_gradient_of_a_projection_keeps_float32_under_bfloat16_compute():
    case = CASES["query"]
    ours, _ = nnx_layers(case, dtype=jnp.bfloat16)
    x, cotangent = (
        random_array(1, (64, 8), "bfloat16"),
        random_array(2, (64, 2, 3), "bfloat16"),
    )
    gradient = output_and_gradients(ours, x, cotangent, "weight")[2]
    exact = np.einsum("nhd,ni->hdi", wide(cotangent), wide(x))
    assert gradient.dtype == jnp.float32
    assert relative_error(gradient, exact) <= 8 * EPS


def operations(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile(NEWER_EMITTERS).as_text()
    found = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = \S+ ([\w-]+)\(", text, re.MULTILINE)
    free = {"bitcast", "parameter", "tuple", "get-tuple-element", "constant"}
    return sorted(name for name in found if name not in free)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_program_is_that_of_the_matrices(dtype):
    """A reshape that costs nothing: no copy, no transpose, no product but the three."""
    x = random_array(1, (6, 16), "float32")
    weight, bias = (
        random_array(2, (4, 8, 16), "float32"),
        random_array(3, (4, 8), "float32"),
    )
    layer = Linear(16, (4, 8), dtype=dtype, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(layer)

    def projected(x, weight, bias):
        layer = nnx.merge(graph, nnx.State({"weight": weight, "bias": bias}))
        return jnp.sum(layer(x).astype("float32") ** 2)

    def matrices(x, weight, bias):
        return jnp.sum(linear(x, weight, bias, dtype=dtype).astype("float32") ** 2)

    theirs = x, weight.reshape(32, 16), bias.reshape(32)
    assert operations(jax.grad(projected, (0, 1, 2)), x, weight, bias) == operations(
        jax.grad(matrices, (0, 1, 2)), *theirs
    )


def test_initial_values_have_the_fan_of_all_input_axes():
    layer = Linear((10, 40), (30, 20), axis=(-2, -1), rngs=nnx.Rngs(0))
    assert layer.weight.shape == (30, 20, 10, 40)
    for values in layer.weight[...], layer.bias[...]:
        assert float(jnp.max(jnp.abs(values))) <= 400**-0.5
        assert relative_error(jnp.var(values), 1 / 1200) < 0.1


def test_an_initializer_draws_the_kernel_as_a_matrix_and_its_names_move():
    seen = []

    def drawn(key, shape, dtype):
        seen.append(shape)
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)):
        layer = Linear(
            (2, 4),
            (8, 3),
            axis=(-2, -1),
            kernel_init=drawn,
            kernel_metadata={"out_sharding": ("a", None, "b", None)},
            rngs=nnx.Rngs(0),
        )
    assert seen == [(8, 24)]
    kernel = jnp.arange(8 * 24.0).reshape(2, 4, 8, 3)
    np.testing.assert_array_equal(layer.weight[...], kernel.transpose(2, 3, 0, 1))
    assert layer.weight.get_metadata("out_sharding") == ("b", None, "a", None)


def test_names_of_all_axes_are_moved_in_linen_on_a_mesh():
    init = nn.with_partitioning(nn.initializers.ones, (None, "b", None))
    layer = jaxlinear.linen.Linear((4, 3), kernel_init=init)
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)):
        weight = layer.init(jax.random.key(0), jnp.ones((5, 8)))["params"]["weight"]
    assert weight.names == ("b", None, None)
    assert weight.value.shape == (4, 3, 8)


def test_heads_are_sharded_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
    x = random_array(1, (4, 5, 8), "float32")
    up, down = (
        Linear(8, (4, 3), rngs=nnx.Rngs(0)),
        Linear((4, 3), 8, axis=(-2, -1), rngs=nnx.Rngs(1)),
    )
    graph, parameters = nnx.split((up, down))

    def loss(parameters, x, spec):
        up, down = nnx.merge(graph, parameters)
        y = up(x)
        return jnp.sum(down(y, out_sharding=spec) ** 2), y

    expected = jax.grad(loss, has_aux=True)(parameters, x, None)
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(
            lambda p: jax.device_put(p, P("model") if p.shape[0] == 4 else P()),
            parameters,
        )
        sharded[1]["weight"].set_value(
            jax.device_put(parameters[1]["weight"][...], P(None, "model"))
        )
        x = jax.device_put(x, P("data"))
        gradients, y = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)(
            sharded, x, P("data", None, None)
        )
    assert jax.typeof(y).sharding.spec == P("data", None, "model", None)
    assert relative_error(y, wide(expected[1])) <= 8 * EPS
    for mine, theirs in zip(
        *map(jax.tree.leaves, (gradients, expected[0])), strict=True
    ):
        assert relative_error(mine, wide(theirs)) <= 8 * EPS


REFUSED = {
    "more axes than features": (
        lambda: Linear(3, 4, axis=(-2, -1), rngs=nnx.Rngs(0)),
        r"^`axis` must have as many axes as `in_features`, got \(-2, -1\) and 3$",
    ),
    "no axis": (
        lambda: Linear((), 4, rngs=nnx.Rngs(0)),
        r"^`in_features` must have a number for one axis at least, got \(\)$",
    ),
    "other sizes": (
        lambda: Linear((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0))(jnp.ones((3, 2))),
        r"^`x` must have in_features \(2, 3\) along its axes \(-2, -1\), got .*2\)$",
    ),
    "too few axes": (
        lambda: Linear((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0))(jnp.ones(3)),
        r"^`x` must have the axes \(-2, -1\), got shape \(3,\)$",
    ),
    "an axis twice": (
        lambda: Linear((3, 3), 4, axis=(-1, 1), rngs=nnx.Rngs(0))(jnp.ones((5, 3))),
        r"^`axis` must not name an axis twice, got \(-1, 1\)$",
    ),
    "other sizes, Linen": (
        lambda: jaxlinear.linen.Linear(4, axis=(0, 1)).apply(
            {"params": {"weight": jnp.ones((4, 2, 3)), "bias": jnp.ones(4)}},
            jnp.ones((3, 2)),
        ),
        r"(?s)^`x` must have in_features \(2, 3\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


STACKED = {
    "a matrix": (8, 3, {}, (8,)),
    "no bias": (8, 3, {"use_bias": False}, (8,)),
    "tuples of one": ((8,), (3,), {"axis": (-1,)}, (8,)),
    "several axes": ((2, 3), (4, 5), {"axis": (-2, -1)}, (2, 3)),
    "heads": (8, (2, 3), {"dtype": "bfloat16"}, (8,)),
}


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("case", STACKED.values(), ids=STACKED)
def test_a_stack_is_called_under_vmap_and_scan_and_refused_without(case, length):
    ins, outs, options, shape = case

    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def stack(rngs):
        return Linear(ins, outs, rngs=rngs, **options)

    layers, x = stack(nnx.Rngs(0)), random_array(1, (6, *shape), "float32")
    message = (
        r"^`weight` must have \d axes, .* a stack of layers is called under `nnx.v"
    )
    with pytest.raises(ValueError, match=message):
        layers(x)
    out_shape = outs if isinstance(outs, tuple) else (outs,)
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
    assert y.shape == (length, 6, *out_shape)
    graph, state = nnx.split(layers)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    tolerance = float(jnp.finfo(y.dtype).eps) * 8
    assert relative_error(first(x), wide(y[0])) <= tolerance
    scanned = nnx.scan(lambda x, layer: (x, layer(x)), in_axes=(nnx.Carry, 0))
    assert relative_error(scanned(x, layers)[1], wide(y)) <= tolerance


OTHER_AXES = {
    "one too few": (8, 3, (8,), (), "`weight` must have 2 axes"),
    "heads in one axis": (8, (2, 3), (6, 8), (6,), "`weight` must have 3 axes"),
    "a bias in one axis": (8, (2, 3), (2, 3, 8), (6,), "`bias` must have shape (2, 3)"),
    "a bias turned around": (8, (2, 3), (2, 3, 8), (3, 2), "`bias` must have shape (2"),
    "a stack of biases": (8, 3, (3, 8), (5, 3), "`bias` must have shape (3,)"),
    "a stack of one bias": (8, (2, 3), (2, 3, 8), (1, 2, 3), "`bias` must have shape"),
}


@pytest.mark.parametrize("case", OTHER_AXES.values(), ids=OTHER_AXES)
def test_parameters_with_other_axes_than_the_layer_are_refused(case):
    ins, outs, weight, bias, message = case
    layer = Linear(ins, outs, rngs=nnx.Rngs(0))
    layer.weight.set_value(jnp.ones(weight))
    layer.bias.set_value(jnp.ones(bias))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer(jnp.ones((5, 8)))


def test_batch_axes_are_refused_with_what_is_in_their_place():
    message = r"^unexpected argument `batch_axis`: map the layer with `nnx.vmap`"
    with pytest.raises(TypeError, match=message):
        Linear(3, 4, batch_axis={0: 2}, rngs=nnx.Rngs(0))
    assert Linear(3, 4, batch_axis={}, rngs=nnx.Rngs(0)).weight.shape == (4, 3)
