"""`in_every_mode` with other ops than the layer, against autodiff of the formula."""

import dataclasses
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


TERMS = {"s": Term("X", contracted=0)}
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
    "a result of another dtype": (
        {
            "forward": lambda x, s: (
                (x.value * s.value).astype("bfloat16"),
                Kept(x.value, s.value),
            )
        },
        r"the forward rule of gain_formula must return float32\[3, 4\], got bfloat16",
    ),
    "a result of another structure": (
        {"forward": lambda x, s: ((x.value * s.value,), Kept(x.value, s.value))},
        "the forward rule of gain_formula must return what the op returns",
    ),
    "a tangent of another shape": (
        {"differential": lambda kept, tangents: tangents[0].sum()},
        r"differential of gain_formula must return float32\[3, 4\], got float32\[\]",
    ),
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
    "names", [{"terms": {"y": Term("X", 0)}}, {"linear_in": [["x"], ["y"]]}], ids=str
)
def test_names_that_the_op_does_not_have_are_refused(names):
    (name,) = names
    with pytest.raises(
        TypeError, match=f"`{name}` must have names .* of _gain, x, s, got y"
    ):
        in_every_mode(_gain, _gain_differential, **names)


@pytest.mark.parametrize("term", [Term("X", 1), Term(None, -2)], ids=str)
def test_an_axis_that_no_rule_can_contract_is_refused(term):
    with pytest.raises(ValueError, match="`contracted` of `s` must be 0, or negative"):
        in_every_mode(_gain, _gain_differential, terms={"s": term})


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


# Ops and residuals of other kinds.


def other(function, forward, backward, differential, nondiff_argnums=(), **names):
    op = jax.custom_vjp(function, nondiff_argnums)
    op.defvjp(forward, backward, symbolic_zeros=True)
    return in_every_mode(op, differential, **names)


def sine(as_kept, from_kept):
    return other(
        jnp.sin,
        lambda x: (jnp.sin(x.value), as_kept(x.value)),
        lambda kept, G: (G * jnp.cos(from_kept(kept)),),
        lambda kept, tangents: tangents[0] * jnp.cos(from_kept(kept)),
    )


@dataclasses.dataclass
class LooksAtItsArray:
    x: Any

    def __post_init__(self):
        assert isinstance(self.x.shape, tuple)


jax.tree_util.register_dataclass(LooksAtItsArray)

RESIDUALS = {
    "an array": (lambda x: x, lambda kept: kept),
    "a tuple": (lambda x: (None, x), lambda kept: kept[1]),
    "a list": (lambda x: [x], lambda kept: kept[0]),
    "a dict": (lambda x: {"x": x, "a": ()}, lambda kept: kept["x"]),
    "a partial": (
        lambda x: jax.tree_util.Partial(jnp.add, x),
        lambda kept: kept(jnp.zeros(())),
    ),
    "a node that looks at its array": (LooksAtItsArray, lambda kept: kept.x),
}


@pytest.mark.parametrize(("as_kept", "from_kept"), RESIDUALS.values(), ids=RESIDUALS)
@pytest.mark.parametrize("name", ["gradients", "jvp", "hessian"])
def test_residuals_may_be_any_tree(name, as_kept, from_kept):
    op, x = sine(as_kept, from_kept), jnp.arange(6.0).reshape(2, 3)

    def derivative(op):
        mapped = jax.vmap(op)
        if name == "gradients":
            return jax.grad(lambda x: mapped(x).sum())(x)
        if name == "jvp":
            return jax.jvp(mapped, (x,), (x,))
        return jax.hessian(lambda x: mapped(x).sum())(x)

    assert_close(derivative(op), derivative(jnp.sin))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("length", [3, 4])
def test_a_residual_of_which_a_part_is_mapped(length, axes):
    op = other(
        gain_formula,
        lambda x, s: (x.value * s.value, ({"x": x.value, "s": [s.value]},)),
        lambda kept, G: (G * kept[0]["s"][0], G * kept[0]["x"]),
        lambda kept, t: sum(
            [
                dx * other
                for dx, other in zip(t, (kept[0]["s"][0], kept[0]["x"]), strict=True)
                if dx is not None
            ]
        ),
    )
    x, s = drawn((length,), (length,))
    x = x if axes[0] is None else jnp.stack([x, 2 * x, 3 * x])
    s = s if axes[1] is None else jnp.stack([s, 2 * s, 3 * s])

    def gradients(op):
        return jax.grad(loss(jax.vmap(op, axes)), (0, 1))(x, s)

    assert_close(gradients(op), gradients(gain_formula))


def test_the_type_of_a_static_argument_counts():
    def divided(x, n):
        return x / n if isinstance(n, float) else x // n

    op = other(
        divided,
        lambda x, n: (divided(x.value, n), ()),
        lambda n, kept, G: (G,),
        lambda n, kept, t: t[0],
        nondiff_argnums=(1,),
    )
    assert (op(jnp.float32(5), 2), op(jnp.float32(5), 2.0)) == (2.0, 2.5)


def test_a_collective_over_the_axis_of_vmap():
    def centred(x):
        return x - jax.lax.pmean(x, "i")

    op = other(
        centred,
        lambda x: (centred(x.value), ()),
        lambda kept, G: (centred(G),),
        lambda kept, t: centred(t[0]),
    )
    x = jnp.arange(5.0)

    def of(op):
        mapped = jax.vmap(op, axis_name="i")
        return mapped(x), jax.jvp(mapped, (x,), (x**2,)), jax.vjp(mapped, x)[1](x**2)

    assert_close(of(op), of(centred))


def test_a_result_of_integers_has_no_tangent():
    def sorted_(x):
        return jnp.sort(x) ** 2, jnp.argsort(x)

    def forward(x):
        return sorted_(x.value), x.value

    def backward(x, G):
        order = jnp.argsort(x)
        return (jnp.zeros_like(x).at[order].set(2 * G[0] * x[order]),)

    def differential(x, tangents):
        order = jnp.argsort(x)
        return (2 * x * tangents[0])[order], np.zeros(x.shape, jax.dtypes.float0)

    op, x = other(sorted_, forward, backward, differential), drawn((5,))[0]
    for derivative in jax.grad, jax.jacfwd, jax.hessian:
        found = derivative(lambda x: jnp.sin(op(x)[0]).sum())(x)
        assert_close(found, derivative(lambda x: jnp.sin(jnp.sort(x) ** 2).sum())(x))


def test_a_backward_rule_gets_cotangents_in_the_dtype_of_the_result():
    def scaled(x, s, w):
        return x + s * w

    dtypes = []

    def backward(kept, G):
        dtypes.append(G.dtype)
        return G, G * kept[0], None

    op = other(
        scaled,
        lambda x, s, w: (scaled(x.value, s.value, w.value), (w.value,)),
        backward,
        lambda kept, t: t[0],
    )
    xs, ones = jnp.ones((5, 4), "bfloat16"), jnp.ones(4, "bfloat16")
    jax.grad(lambda x, s: jax.vmap(op, (0, None, None))(x, s, ones).sum(), (0, 1))(
        xs, ones
    )
    assert {*dtypes} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("sets", [[["x"], ["s"]], [["x", "p"], ["x"]], []], ids=str)
def test_taylor_series_of_an_op_with_a_third_argument(sets):
    def formula(x, s, p):
        return x * s * jnp.exp(p)

    def differential(kept, tangents):
        return jax.jvp(formula, kept, tangents)[1]

    op = other(
        formula,
        lambda *a: (formula(*(p.value for p in a)), tuple(p.value for p in a)),
        lambda kept, G: jax.vjp(formula, *kept)[1](G),
        differential,
        linear_in=sets,
    )
    primals, series = (0.7, 1.3, 0.2), ([1.0, 0.3], [0.5, 0.1], [0.2, 0.4])
    primals = [jnp.float32(p) for p in primals]
    series = [[jnp.float32(c) for c in one] for one in series]
    assert_close(jet(op, primals, series), jet(formula, primals, series))


def test_taylor_series_of_a_tangent_that_is_no_product():
    class KX(NamedTuple):
        x: Any

    op = other(
        jnp.sin,
        lambda x: (jnp.sin(x.value), KX(x.value)),
        lambda kept, G: (G * jnp.cos(kept.x),),
        lambda kept, t: t[0] * jnp.cos(kept.x),
        terms={"x": Term("x", contracted=0)},
    )

    def of(f):
        return jet(lambda x: jax.jvp(f, (x,), (1.0,))[1], (0.7,), ([1.0, 0.3, 0.1],))

    assert_close(of(op), of(jnp.sin))


def test_eager_gradients_of_a_map_run_the_backward_rule_once():
    calls = []

    def backward(kept, G):
        calls.append(G)
        return _gain_backward(kept, G)

    op = op_with(backward=backward)
    x, s = drawn((3, 4), (4,))
    jax.grad(loss(jax.vmap(op, (0, None))), (0, 1))(x, s)
    assert len(calls) == 1


REFUSED = {
    "several arguments without names": (
        lambda *xs: xs[0],
        r"must have positional arguments with names, got .*\(\*xs\)",
    ),
    "an argument by name": (
        lambda x, *, n=2.0: x * n,
        r"must have positional arguments with names, got .*\(x, \*, n=2.0\)",
    ),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_have_no_place_are_refused(function, message):
    with pytest.raises(TypeError, match=message):
        other(function, lambda x: (x.value, ()), lambda r, G: (G,), lambda r, t: t[0])


def test_a_tree_for_an_argument_is_refused():
    with pytest.raises(TypeError, match="`x` of gain_formula must be an array or None"):
        op_with()({"x": jnp.ones(3)}, jnp.ones(3))


def test_rules_that_are_registered_again_without_symbolic_zeros_are_refused():
    op = jax.custom_vjp(gain_formula)
    op.defvjp(_gain_forward, _gain_backward, symbolic_zeros=True)
    gain = in_every_mode(op, _gain_differential)
    op.defvjp(lambda x, s: (x * s, (x, s)), _gain_backward)
    with pytest.raises(TypeError, match=r"must be a jax.custom_vjp with rules by"):
        gradients(gain)


def test_a_traced_array_that_the_op_closes_over_is_refused():
    @jax.jit
    def closing(c, x):
        op = sine(lambda x: x * c, lambda kept: kept)
        of_c = jax.custom_vjp(lambda x: x * c)
        of_c.defvjp(lambda x: (x.value * c, ()), lambda r, G: (G,), symbolic_zeros=True)
        return op(x) + in_every_mode(of_c, lambda r, t: t[0])(x)

    with pytest.raises(TypeError, match="must not close over a traced array"):
        closing(2.0, jnp.ones(2))
