"""A VJP object that leaves the weights out: no byte of them is held, cast or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from oracle import naive, random_array

import jaxlinear.linen
import jaxlinear.nnx

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 1), reason="needs JAX 0.11.1"
)

ROWS, WIDTH, STACKED = 4, 16, 3
RECIPES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "FLOAT8": {"products": jaxlinear.FLOAT8},
    "FLOAT8_E4M3": {"products": jaxlinear.FLOAT8_E4M3},
    "INT8": {"products": jaxlinear.INT8},
}


def of_arrays(use_bias, options):
    parameters = {"weight": random_array(0, (WIDTH, WIDTH), "float32")}
    if use_bias:
        parameters["bias"] = random_array(1, (WIDTH,), "float32")
    return parameters, lambda p, x: jaxlinear.linear(x, **p, **options)


def in_nnx(use_bias, options):
    module = jaxlinear.nnx.Linear(
        WIDTH, WIDTH, use_bias=use_bias, rngs=nnx.Rngs(0), **options
    )
    graph, parameters = nnx.split(module)
    return parameters, lambda p, x: nnx.merge(graph, p)(x)


def in_linen(use_bias, options):
    module = jaxlinear.linen.Linear(WIDTH, use_bias, **options)
    return module.init(jax.random.key(0), jnp.zeros(WIDTH)), module.apply


def of_several_axes(use_bias, options):
    module = jaxlinear.linen.Linear((4, 4), use_bias, axis=(-2, -1), **options)

    def layer(parameters, x):
        return module.apply(parameters, x.reshape(-1, 4, 4)).reshape(-1, WIDTH)

    return module.init(jax.random.key(0), jnp.zeros((4, 4))), layer


def one(parameters, layer):
    return parameters, layer


def scanned(parameters, layer):
    """A stack of layers of other parameters, and the function of them."""

    def stack(parameters, x):
        def step(x, parameters):
            return layer(parameters, x).astype(x.dtype), None

        return lax.scan(step, x, parameters)[0]

    factors = 1 + jnp.arange(STACKED, dtype="float32")
    return jax.tree.map(lambda a: jnp.multiply.outer(factors, a), parameters), stack


X = random_array(2, (ROWS, WIDTH), "float32")
FORMS = pytest.mark.parametrize("form", [of_arrays, in_nnx, in_linen])
DEPTHS = pytest.mark.parametrize(("wrapped", "depth"), [(one, 1), (scanned, STACKED)])


def held_bytes(parameters, layer, **options):
    """The bytes of a VJP object of a jitted forward pass."""
    _, vjp = jax.eval_shape(lambda *a: jax.vjp(layer, *a, **options), parameters, X)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))


def held_without_weights(parameters, layer):
    return held_bytes(parameters, layer, saveable_args=(False, True))


@DEPTHS
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("form", [of_arrays, in_nnx, in_linen, of_several_axes])
def test_under_checkpoint_only_the_inputs_are_held(
    form, options, use_bias, wrapped, depth
):
    parameters, layer = form(use_bias, options)
    held = held_without_weights(*wrapped(parameters, jax.checkpoint(layer)))
    assert held == depth * X.nbytes


@DEPTHS
@pytest.mark.parametrize("use_bias", [True, False])
@FORMS
def test_in_float32_only_the_inputs_are_held_without_checkpoint(
    form, use_bias, wrapped, depth
):
    held = held_without_weights(*wrapped(*form(use_bias, {})))
    assert held == depth * X.nbytes


@FORMS
def test_outside_jit_the_arguments_are_held_as_they_came(form):
    parameters, layer = form(True, {})
    _, vjp = jax.vjp(layer, parameters, X, saveable_args=(False, False))
    assert not any(leaf.size for leaf in jax.tree.leaves(vjp))


def test_on_an_explicit_mesh_the_arguments_are_held_as_they_came():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Explicit,))
    parameters, layer = of_arrays(False, {})
    with jax.set_mesh(mesh):
        arrays = jax.device_put((parameters, X), jax.P())
        _, vjp = jax.vjp(layer, *arrays, saveable_args=(False, False))
    assert not any(leaf.size for leaf in jax.tree.leaves(vjp))


@DEPTHS
def test_the_naive_formula_holds_a_transposed_weight(wrapped, depth):
    parameters, _ = of_arrays(False, {})
    weight, layer = wrapped(parameters["weight"], lambda w, x: naive(x, w))
    assert held_without_weights(weight, layer) == depth * X.nbytes + weight.nbytes


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
@FORMS
def test_of_an_input_without_a_gradient_no_weight_is_held(form, options):
    # A weight of 8 bits would already take as many bytes as this input of 32.
    assert held_bytes(*form(True, options), in_nzs=(True, False)) <= X.nbytes


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_gradients_have_the_bits_of_those_of_an_object_that_holds_all(options):
    parameters, layer = of_arrays(True, options)

    @jax.jit
    def forward(parameters, x):
        held = jax.checkpoint(layer)
        return jax.vjp(held, parameters, x, saveable_args=(False, True))

    @jax.jit
    def backward(vjp, parameters, G):
        vjp.args_res[0] = parameters
        return vjp(G)

    @jax.jit
    def plain(parameters, x):
        Y, vjp = jax.vjp(layer, parameters, x)
        return vjp(Y)

    Y, vjp = forward(parameters, X)
    found, expected = backward(vjp, parameters, Y), plain(parameters, X)
    for ours, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_gradients_of_four_stages_can_come_later(dtype):
    """A zero-bubble pipeline: ∇X of every stage, and then every ∇W, bit for bit."""
    stages, width = 4, 32
    weights = [random_array(k, (2, width, width), "float32") for k in range(stages)]
    x = random_array(9, (16, width), "float32")

    def stage(weights, x):
        for weight in weights:
            y = jaxlinear.linear(x, weight / width**0.5, dtype=dtype)
            x = x + jnp.tanh(y).astype("float32")
        return x

    def loss(weights, x):
        for some in weights:
            x = stage(some, x)
        return jnp.sum(x**2) / 2

    wanted, later = jax.ad.GradValue(), jax.ad.DontWant()
    backward = jax.jit(lambda vjp, G: vjp.with_refs(later, wanted)(G)[1])
    of_weights = jax.jit(lambda vjp, G: vjp.with_refs(wanted, later)(G)[0])
    forward = jax.jit(lambda *a: jax.vjp(stage, *a))
    vjps, y = [], x
    for some in weights:
        y, vjp = forward(some, y)
        vjps.append(vjp)
    G = [y]
    for vjp in reversed(vjps[1:]):
        G.append(backward(vjp, G[-1]))
    found = [of_weights(*both) for both in zip(vjps, reversed(G), strict=True)]
    expected = jax.jit(jax.grad(loss))(weights, x)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)

    def flops(function):
        return function.lower(vjps[1], G[0]).compile().cost_analysis()["flops"]

    product = 2 * 16 * width * width
    assert flops(backward) + flops(of_weights) < 7 * product  # Six, and the additions.
