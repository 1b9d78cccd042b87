"""`in_every_mode` with other ops than the layer, against autodiff of the formula."""

import functools
import itertools
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet
from jax.sharding import AxisType, PartitionSpec

from jaxlinear import _every_mode
from jaxlinear._every_mode import Term, in_every_mode

P = PartitionSpec


class Kept(NamedTuple):
    X: Any
    S: Any


@jax.custom_vjp
def _gain(x, s):
    return x * s


def _gain_forward(x, s):
    X = x.value if s.perturbed else None
    S = s.value if x.perturbed else None
    return x.value * s.value, Kept(X, S)


def _gain_backward(kept, G):
    grad_x = None if kept.S is None else G * kept.S
    grad_s = None if kept.X is None else jnp.sum(G * kept.X, range(G.ndim - 1))
    return grad_x, grad_s


_gain.defvjp(_gain_forward, _gain_backward, symbolic_zeros=True)


def _gain_differential(kept, tangents):
    dx, ds = tangents
    terms = [] if dx is None else [dx * kept.S]
    terms += [] if ds is None else [kept.X * ds]
    return sum(terms[1:], terms[0])


def gain_formula(x, s):
    return x * s


TERMS = {"x": Term("S"), "s": Term("X", contracted=0)}
GAINS = {
    "nothing said": in_every_mode(_gain, _gain_differential),
    "terms": in_every_mode(_gain, _gain_differential, terms=TERMS),
    "terms and leading axes": in_every_mode(
        _gain,
        _gain_differential,
        terms=TERMS,
        leading=["x", "X"],
        linear_in=[["x"], ["s"]],
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _norm(name, x, power, scale):
    return {name: jnp.sum(jnp.abs(x) ** power, -1) * scale, "x": jnp.sin(x)}


def _norm_forward(name, x, power, scale):
    # A tuple without names, and a tree inside.
    kept = (x.value, {"scale": scale.value}) if x.perturbed else (x.value, None)
    return _norm.fun(name, x.value, power, scale.value), kept


def _norm_derivative(x, power):
    return power * jnp.sign(x) * jnp.abs(x) ** (power - 1)


def _norm_backward(name, power, kept, G):
    x, inner = kept
    grad_x = None
    if inner is not None:
        to_norm = (G[name] * inner["scale"])[..., None] * _norm_derivative(x, power)
        grad_x = to_norm + G["x"] * jnp.cos(x)
    return grad_x, jnp.sum(G[name] * jnp.sum(jnp.abs(x) ** power, -1))


_norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


def _norm_differential(name, power, kept, tangents):
    (x, inner), (dx, dscale) = kept, tangents
    of_norm, of_x = jnp.zeros(x.shape[:-1]), jnp.zeros_like(x)
    if dx is not None:
        of_norm += jnp.sum(_norm_derivative(x, power) * dx, -1) * inner["scale"]
        of_x += jnp.cos(x) * dx
    if dscale is not None:
        of_norm += jnp.sum(jnp.abs(x) ** power, -1) * dscale
    return {name: of_norm, "x": of_x}


norm = in_every_mode(_norm, _norm_differential)


def of_arrays(op):
    """The op of several results and static arguments, as a function of two arrays."""

    def function(x, scale):
        norm, x = jax.tree.leaves(op("norm", x, 3, scale=scale[0]))
        return jnp.concatenate([norm[..., None], x], -1)

    return function


OPS = {name: (op, gain_formula) for name, op in GAINS.items()}
OPS["several results"] = (
    of_arrays(norm),
    of_arrays(lambda *a, scale: _norm.fun(*a, scale)),
)
every_op = pytest.mark.parametrize(("op", "formula"), OPS.values(), ids=OPS)


@pytest.fixture(autouse=True)
def ranks_are_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


def drawn(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def assert_close(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
        found,
        expected,
    )


def loss(op):
    return lambda x, s: jnp.sum(jnp.sin(op(x, s)))


DERIVATIVES = {
    "gradients": lambda op: jax.grad(loss(op), (0, 1)),
    "gradient of x": lambda op: jax.grad(loss(op)),
    "gradient of s": lambda op: jax.grad(loss(op), 1),
    "jvp": lambda op: lambda x, s: jax.jvp(op, (x, s), (s + x, s)),
    "jacfwd": lambda op: jax.jacfwd(op, (0, 1)),
    "jacrev": lambda op: jax.jacrev(op, (0, 1)),
    "hessian": lambda op: jax.hessian(loss(op), (0, 1)),
    "reverse over reverse": lambda op: jax.jacrev(jax.jacrev(loss(op), (0, 1)), (0, 1)),
    "forward over forward": lambda op: jax.jacfwd(jax.jacfwd(loss(op), 1), (0, 1)),
    "remat": lambda op: jax.hessian(jax.checkpoint(loss(op)), (0, 1)),
    "jit": lambda op: jax.jit(jax.grad(jax.jit(loss(op)), (0, 1))),
}


@every_op
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_the_formula(name, op, formula):
    arrays = drawn((2, 4), (4,))
    derivative = DERIVATIVES[name]
    assert_close(derivative(op)(*arrays), derivative(formula)(*arrays))


AXES = [(0, 0), (0, None), (1, None), (None, 0), (1, 0)]
TWICE = [*itertools.product([(0, 0), (0, None), (None, 0)], repeat=2)]


@every_op
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("order", ["grad of vmap", "vmap of grad", "jvp of vmap"])
def test_maps_are_those_of_the_formula(order, axes, op, formula):
    x, s = drawn((3, 4), (4,))
    x = x if axes[0] is None else jnp.stack([x, 2 * x], axes[0])
    s = s if axes[1] is None else jnp.stack([s, 3 * s], axes[1])

    def mapped(op):
        if order == "grad of vmap":
            return jax.grad(loss(jax.vmap(op, axes)), (0, 1))(x, s)
        if order == "vmap of grad":
            return jax.vmap(jax.grad(loss(op), (0, 1)), axes)(x, s)
        return jax.jvp(jax.vmap(op, axes), (x, s), (x, s))

    assert_close(mapped(op), mapped(formula))


@every_op
@pytest.mark.parametrize(("inner", "outer"), TWICE)
def test_maps_of_maps_are_those_of_the_formula(inner, outer, op, formula):
    x, s = drawn((3, 4), (4,))
    for axes in inner, outer:
        x = x if axes[0] is None else jnp.stack([x, 2 * x], axes[0])
        s = s if axes[1] is None else jnp.stack([s, 3 * s], axes[1])

    def mapped(op):
        return jax.grad(loss(jax.vmap(jax.vmap(op, inner), outer)), (0, 1))(x, s)

    assert_close(mapped(op), mapped(formula))


@every_op
def test_an_op_in_a_scan(op, formula):
    x, s = drawn((3, 4), (5, 4))

    def scanned(op):
        def total(x, s):
            return jax.lax.scan(lambda x, s: (op(x, s)[..., :4], None), x, s)[0].sum()

        return jax.grad(total, (0, 1))(x, s)

    assert_close(scanned(op), scanned(formula))


@every_op
def test_replicated_arguments_under_shard_map_have_summed_gradients(op, formula):
    mesh = jax.make_mesh((8,), ("rows",), (AxisType.Auto,))

    def total(op):
        @jax.shard_map(mesh=mesh, in_specs=(P("rows"), P()), out_specs=P())
        def total(x, s):
            return jax.lax.psum(loss(op)(x, s), "rows")

        return total

    x, s = drawn((16, 4), (4,))
    assert_close(
        jax.grad(total(op), (0, 1))(x, s), jax.grad(loss(formula), (0, 1))(x, s)
    )


@pytest.mark.parametrize("op", GAINS.values(), ids=GAINS)
def test_taylor_series_are_those_of_the_formula(op):
    primals = drawn((3, 4), (4,))
    series = [drawn((3, 4), (3, 4)), drawn((4,), (4,))]

    def of(op):
        return jet(op, primals, series), jet(
            jax.grad(loss(op), (0, 1)), primals, series
        )

    assert_close(of(op), of(gain_formula))


def test_the_transpose_of_an_op_that_is_linear():
    x, s = drawn((3, 4), (4,))
    gain = GAINS["terms and leading axes"]
    assert_close(jax.linear_transpose(lambda x: gain(x, s), x)(x), (x * s,))
    assert_close(jax.linear_transpose(lambda s: gain(x, s), s)(x), ((x * x).sum(0),))
    with pytest.raises(TypeError, match=r"_gain must be linear in .* got s and x"):
        jax.linear_transpose(gain, x, s)(x)
    with pytest.raises(TypeError, match=r"must be linear in .* got x"):
        jax.linear_transpose(lambda x: GAINS["terms"](x, s), x)(x)


def has_a_gradient_for_each_element(op):
    xs, s = jnp.ones((16, 3, 4)), jnp.ones(4)
    gradient = jax.grad(lambda s: jax.vmap(op, (0, None))(xs, s).sum())
    shown = jax.make_jaxpr(gradient)(s)
    return "f32[16,4]" in str(shown)


def test_a_term_that_contracts_has_no_gradient_for_each_element():
    assert has_a_gradient_for_each_element(GAINS["nothing said"])
    assert not has_a_gradient_for_each_element(GAINS["terms"])
    assert not has_a_gradient_for_each_element(GAINS["terms and leading axes"])


def kept_shapes(op, *arrays):
    return [a.shape for a in jax.tree.leaves(jax.vjp(op, *arrays)[1])]


def test_only_the_residuals_of_what_is_perturbed_are_kept():
    x, s = drawn((3, 4), (4,))
    gain = GAINS["nothing said"]
    assert kept_shapes(lambda x: gain(x, s), x) == [s.shape]
    assert kept_shapes(lambda s: gain(x, s), s) == [x.shape]


def test_different_arguments_frozen_in_one_program():
    x, s = drawn((3, 4), (4,))
    block = jax.checkpoint(GAINS["nothing said"])

    def twice(block):
        return jax.grad(lambda x, s: block(block(x, s), jnp.ones(4)).sum(), (0, 1))(
            x, s
        )

    assert_close(twice(block), twice(gain_formula))


# What a rule must return.


def op_with(
    forward=_gain_forward, backward=_gain_backward, differential=_gain_differential
):
    op = jax.custom_vjp(gain_formula)
    op.defvjp(forward, backward, symbolic_zeros=True)
    return in_every_mode(op, differential)


def gradients(op, dtype="float32"):
    x, s = jnp.ones((3, 4), dtype), jnp.ones(4)
    return jax.grad(lambda x, s: op(x, s).sum().astype("float32"), (0, 1))(x, s)


WRONG = {
    "a cotangent of another dtype": (
        {
            "backward": lambda kept, G: (
                G * kept.S,
                _gain_backward(kept, G)[1].astype("bfloat16"),
            )
        },
        r"gain_formula must return a cotangent of float32\[4\] for `s`, got bfloat16",
    ),
    "a cotangent of another shape": (
        {"backward": lambda kept, G: (G * kept.S, G * kept.X)},
        r"a cotangent of float32\[4\] for `s`, got float32\[3, 4\]",
    ),
    "one cotangent": (
        {"backward": lambda kept, G: G},
        "must return a tuple of the cotangents of `x`, `s`, got",
    ),
    "a tangent of another structure": (
        {"differential": lambda kept, tangents: [tangents[0]]},
        "the differential of gain_formula must return what the op returns",
    ),
}


@pytest.mark.parametrize(("rules", "message"), WRONG.values(), ids=WRONG)
def test_a_rule_that_returns_something_else_is_named(rules, message):
    with pytest.raises(TypeError, match=message):
        gradients(op_with(**rules))


def without_rules():
    return jax.custom_vjp(gain_formula)


def with_plain_rules():
    op = jax.custom_vjp(gain_formula)
    op.defvjp(lambda x, s: (x * s, (x, s)), _gain_backward)
    return op


@pytest.mark.parametrize("op", [gain_formula, without_rules(), with_plain_rules()])
def test_what_has_no_such_rules_is_refused(op):
    with pytest.raises(TypeError, match=r"`op` must be a jax.custom_vjp with rules by"):
        in_every_mode(op, _gain_differential)


@pytest.mark.parametrize(
    "names", [{"terms": {"y": Term("X")}}, {"linear_in": [["x"], ["y"]]}], ids=str
)
def test_names_that_the_op_does_not_have_are_refused(names):
    (name,) = names
    with pytest.raises(
        TypeError, match=f"`{name}` must have names .* of _gain, x, s, got y"
    ):
        in_every_mode(_gain, _gain_differential, **names)


def test_low_precision_sums_over_mapped_elements_in_float32():
    xs = jnp.ones((1000, 4), "bfloat16")
    gradient = jax.grad(
        lambda s: jax.vmap(GAINS["nothing said"], (0, None))(xs, s).sum()
    )
    np.testing.assert_array_equal(gradient(jnp.ones(4, "bfloat16")), 1000)


def test_the_folder_works_as_a_copy_without_the_package(tmp_path):
    shutil.copytree(pathlib.Path(_every_mode.__file__).parent, tmp_path / "copied")
    program = """
        import sys
        sys.modules["jaxlinear"] = None
        import jax
        from copied import in_every_mode

        op = jax.custom_vjp(lambda x: x * x)
        op.defvjp(lambda x: (x.value**2, x.value), lambda x, G: (2 * x * G,), True)
        square = in_every_mode(op, lambda x, tangents: 2 * x * tangents[0])
        print(jax.grad(square)(3.0), jax.jvp(square, (3.0,), (1.0,))[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "6.0 6.0\n", run.stderr
