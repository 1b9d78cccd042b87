"""Forward mode and reverse mode are one rule each, whatever is differentiated.

Values are in `deep/test_transformations_of_linear.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive, random_problem, relative_error, wide
from transformations.losses import directions

import jaxlinear
from jaxlinear import _linear, linear

nnx = pytest.importorskip("flax.nnx")

ARRAYS = random_problem((6, 5), 4, 3, "float32")[:3]


def squares(layer):
    return lambda *a: jnp.sum(layer(*a).astype("float32") ** 2)


REVERSE = {
    "grad": lambda *a: jax.grad(squares(linear), (0, 1, 2))(*a),
    "vjp of jit": lambda *a: jax.vjp(jax.jit(linear), *a)[1](linear(*a)),
    "grad of vmap": lambda *a: jax.grad(
        squares(jax.vmap(linear, (0, None, None))), (0, 1, 2)
    )(*a),
    "vmap of grad": lambda *a: jax.vmap(jax.grad(squares(linear)), (0, None, None))(*a),
    "remat": lambda *a: jax.grad(jax.checkpoint(squares(linear)))(*a),
    "transpose of linearize": lambda *a: jax.linear_transpose(
        jax.linearize(linear, *a)[1], *a
    )(linear(*a)),
    "linear_transpose": lambda x, weight, bias: jax.linear_transpose(
        lambda x: linear(x, weight), x
    )(linear(x, weight)),
}


@pytest.fixture
def registered(replace):
    """Registers other rules with the `jax.custom_vjp`, made of those that it has."""

    def register(forward=lambda rule: rule, backward=lambda rule: rule):
        op = _linear._linear
        replace(op, "fwd", forward(op.fwd))
        replace(op, "bwd", backward(op.bwd))

    return register


@pytest.mark.parametrize("name", REVERSE)
def test_every_reverse_mode_runs_the_registered_rules(name, registered):
    calls = []

    def counted(rule):
        def count(*arguments):
            calls.append(rule)
            return rule(*arguments)

        return count

    rules = _linear._linear.fwd, _linear._linear.bwd
    registered(counted, counted)
    REVERSE[name](*ARRAYS)
    assert set(calls) == set(rules)


def raising(rule):
    def raises(*arguments):
        raise NotImplementedError(rule.__name__)

    return raises


@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_no_reverse_mode_is_without_the_registered_rules(which, name, registered):
    registered(**{which: raising})
    with pytest.raises(NotImplementedError, match=f"_linear_{which}"):
        REVERSE[name](*ARRAYS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("products", [None, jaxlinear.FLOAT8, jaxlinear.INT8])
def test_low_precision_has_no_rules_of_its_own(dtype, products, registered):
    layer = functools.partial(linear, dtype=dtype, products=products)
    registered(backward=raising)
    with pytest.raises(NotImplementedError, match="_linear_backward"):
        jax.grad(squares(layer))(*ARRAYS)


FORWARD = {
    "jvp": lambda *a: jax.jvp(linear, a, a),
    "jacfwd": lambda *a: jax.jacfwd(linear)(*a),
    "hessian": lambda *a: jax.hessian(squares(linear))(*a),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_runs_the_registered_forward_rule(name, registered):
    registered(forward=raising)
    with pytest.raises(NotImplementedError, match="_linear_forward"):
        FORWARD[name](*ARRAYS)


@pytest.mark.parametrize(
    ("moving", "count"), [((0,), 1), ((1,), 1), ((2,), 0), ((0, 1), 2), ((0, 1, 2), 2)]
)
def test_a_frozen_argument_costs_no_product_in_forward_mode(moving, count):
    def derivative(*tangents):
        def of(*some):
            every = dict(enumerate(ARRAYS)) | dict(zip(moving, some, strict=True))
            return linear(*every.values())

        return jax.jvp(of, tuple(ARRAYS[k] for k in moving), tangents)

    compiled = jax.jit(derivative).lower(*(ARRAYS[k] for k in moving)).compile()
    assert compiled.as_text().count(" dot(") <= 1 + count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_tangent_of_two_products_is_rounded_once(dtype):
    x, weight, _ = ARRAYS
    arrays = x.astype(dtype), weight.astype(dtype)
    tangents = directions(*arrays)
    actual = jax.jvp(linear, arrays, tangents)[1]
    (X, W), (dX, dW) = ([wide(a) for a in arrays], [wide(t) for t in tangents])
    exact = dX @ W.T + X @ dW.T
    rounded = exact.astype(actual.dtype)
    assert actual.dtype == dtype
    assert np.mean(np.asarray(actual) == np.asarray(rounded)) > 0.97


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_map_over_x_costs_what_one_more_leading_axis_does(dtype):
    layer = functools.partial(linear, dtype=dtype)
    shapes = (32, 16, 128), (256, 128), (256,)
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

    def costs(layer):
        gradients = jax.grad(squares(layer), (0, 1, 2))
        compiled = jax.jit(gradients).lower(*arrays).compile()
        operations = compiled.cost_analysis()["flops"]
        return compiled.memory_analysis().temp_size_in_bytes, operations

    mapped = jax.vmap(layer, (0, None, None))
    for cost, limit in zip(costs(mapped), costs(layer), strict=True):
        assert cost <= 1.02 * limit


def test_forward_mode_through_a_model_that_knows_nothing_of_it():
    class MLP(nnx.Module):
        def __init__(self, layer):
            self.hidden = layer(4, 8, rngs=nnx.Rngs(0))
            self.head = layer(8, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(jnp.tanh(self.hidden(x)))

    ours, flax = MLP(jaxlinear.nnx.Linear), MLP(nnx.Linear)
    for mine, theirs in (ours.hidden, flax.hidden), (ours.head, flax.head):
        theirs.kernel[...], theirs.bias[...] = mine.weight[...].T, mine.bias[...]
    x, _, _ = ARRAYS

    @nnx.jit
    def derivatives(model, x):
        return jax.jvp(model, (x,), (x,)), jax.jacfwd(model)(x[0, 0])

    for a, e in zip(
        *(jax.tree.leaves(derivatives(m, x)) for m in (ours, flax)), strict=True
    ):
        assert relative_error(a, wide(e)) < 1e-5


def test_a_linear_transpose_has_derivatives_of_its_own():
    x, weight, _ = ARRAYS

    def pulled_back(layer):
        def of(weight):
            transposed = jax.linear_transpose(lambda x: layer(x, weight), x)
            return jnp.sum(transposed(naive(x, weight))[0] ** 2)

        return jax.grad(of)(weight)

    np.testing.assert_allclose(pulled_back(linear), pulled_back(naive), rtol=1e-4)


NESTED = {
    "the weight twice": ((None, 0, None), (None, 0, 0)),
    "bias and weight, x": ((None, 0, 0), (0, None, None)),
    "x, weight": ((0, None, None), (None, 0, None)),
    "bias, weight": ((None, None, 0), (None, 0, None)),
    "x and weight, x and bias": ((0, 0, None), (0, None, 0)),
    "weight, x twice": ((0, 0, None), (0, None, None)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", NESTED)
def test_gradients_of_maps_inside_each_other(name, dtype):
    inner, outer = NESTED[name]
    rng = np.random.default_rng(0)
    arrays = []
    for shape, *axes in zip([(3, 4), (5, 4), (5,)], inner, outer, strict=True):
        sizes = [2] * sum(axis == 0 for axis in axes)
        arrays.append(rng.normal(size=(*sizes, *shape)).astype(dtype))
    mapped = {
        layer: jax.vmap(jax.vmap(layer, inner), outer) for layer in (linear, naive)
    }
    Y = mapped[naive](*[a.astype("float32") for a in arrays])
    G = rng.normal(size=Y.shape).astype(dtype)
    actual = jax.vjp(mapped[linear], *arrays)[1](G)
    wider = [a.astype("float32") for a in arrays]
    expected = jax.vjp(mapped[naive], *wider)[1](G.astype("float32"))
    for ours, theirs in zip(actual, expected, strict=True):
        tolerance = 2 * float(jnp.finfo(dtype).eps)
        assert relative_error(ours, wide(theirs)) < tolerance


def test_a_mapped_bias_costs_the_other_gradients_no_accuracy():
    x, weight, bias = ARRAYS
    biases = jnp.stack([bias, 2 * bias, -bias])
    mapped = jax.vmap(functools.partial(linear, dtype="bfloat16"), (None, None, 0))
    Y, vjp = jax.vjp(lambda weight: mapped(x, weight, biases), weight)
    G = jnp.cos(7 * Y)
    exact = np.einsum("uabo,abi->oi", wide(G), wide(x.astype("bfloat16")))
    assert relative_error(vjp(G)[0], exact) < 1e-6
