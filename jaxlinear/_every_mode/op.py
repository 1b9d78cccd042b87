"""An op that JAX differentiates by the rules of its `jax.custom_vjp`, in every mode."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial, wraps
from inspect import Parameter, signature
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from .levels import Level, Term, batched, under_levels
from .linear_map import linear_map
from .open import OpenPrimitive


def in_every_mode(
    op: Callable[..., Any],
    differential: Callable[..., Any],
    *,
    terms: Mapping[str, Term] | None = None,
    leading: Collection[str] = (),
    linear_in: Collection[Collection[str]] = (),
    mapped: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The function of ``op``, differentiable in every mode by the rules of ``op``.

    Write a `jax.custom_vjp` and its differential::

        op.defvjp(forward, backward, symbolic_zeros=True)

        forward :: *primals -> result, residuals  (static arguments at their places)
        backward :: *static, residuals, cotangent of the result -> cotangents
        differential :: *static, residuals, tangents -> tangent of the result

    Reverse mode runs the forward and the backward rule. Forward mode runs the forward
    rule and the differential. A call that is not differentiated runs the function of
    ``op``. The modes combine, to any order, under `jax.vmap`, `jax.checkpoint`,
    `jax.shard_map` and the loops of `jax.lax`. Only the residuals are kept.

    ``primals`` and ``tangents`` are in the order of the arguments. A primal has a
    ``value`` and says whether it is ``perturbed``; the tangent of any other is None.
    Residuals are any tree, which may differ with what is perturbed. An argument is an
    array or None, and its primal is then None. The results are arrays in any tree. The
    tangent of an integer result is zeros of dtype ``jax.dtypes.float0``. The function
    must have no effects, and must not close over a traced array.

    ``terms``, ``leading`` and ``linear_in`` tell `jax.vmap`, `jax.linear_transpose` and
    `jet` what the rules can do. The gradients are right without them.

    Args:
      op: a `jax.custom_vjp` with its rules. Its static arguments, those of
        ``nondiff_argnums``, have a hash.
      differential: the derivative of ``op`` along ``tangents``, of which one at least
        is not None. It is linear in them.
      terms: for the name of an argument what its cotangent reads. The backward rule
        then contracts what is mapped, and there is no cotangent for each element. The
        rule must take a cotangent of the result in float32, a sum over elements, where
        the result has fewer bits. The residuals must be a named tuple, of which all
        fields but the one that is read are then None.
      leading: the names of the arguments and residuals that have the leading axes of
        the result, if the rules work with any number of them. Where all of these are
        mapped, and nothing else, the mapped axis becomes one more leading axis.
      linear_in: sets of names: in the arguments of each of them together ``op`` is
        linear, so that `jax.linear_transpose` takes it.
      mapped: a function of the same arguments and results that `jax.vmap` maps in the
        place of ``op``: one whose cotangents need less memory for many elements.

    Returns:
      The function, with the arguments of ``op``.

    Raises:
      ValueError: if a term contracts a positive axis.
      TypeError: if ``op`` is not such an object, or ``terms`` or ``linear_in`` has an
        unknown name; later if a rule returns another structure, shape or dtype than
        it must.
    """
    check_rules(op)
    sets = tuple(map(frozenset, linear_in))
    checked = Op(op, differential, dict(terms or {}), frozenset(leading), sets, mapped)
    checked.check_names()

    @wraps(checked.vjp.fun)
    def in_any_mode(*args, **kwargs):
        every = checked.signature.bind(*args, **kwargs)
        every.apply_defaults()
        arrays, static = checked.split(every.args)
        arrays, tree = jax.tree.flatten(varying_together(arrays))
        parameters = {"static": static, "tree": tree, "levels": ()}
        return every_mode_p.tree(*arrays, op=checked, **parameters)

    return in_any_mode


def check_rules(op):
    if not isinstance(op, jax.custom_vjp) or not op.symbolic_zeros:
        raise TypeError(
            "`op` must be a jax.custom_vjp with rules by"
            f" `op.defvjp(forward, backward, symbolic_zeros=True)`, got {op!r:.60}"
        )


def varying_together(arrays):
    """The arrays, cast to vary over every manual axis of any of them.

    JAX transposes the cast into the sum of a cotangent over the axes of
    `jax.shard_map` along which its primal does not vary.
    """
    arrays = jax.tree.map(_as_array, arrays)
    varying = [jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def cast(a):
        missing = axes - jax.typeof(a).manual_axis_type.varying
        return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return jax.tree.map(cast, arrays)


def _as_array(value):
    # An array as it is: a copy of an argument would be one more residual.
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


@dataclasses.dataclass(frozen=True)
class Primal:
    """An argument as a forward rule gets it, with whether it is differentiated."""

    value: Any
    perturbed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """What :func:`in_every_mode` is given.

    The rules are read from the `jax.custom_vjp` each time that they run.
    """

    vjp: Any  # A `jax.custom_vjp` with its rules.
    differential: Callable[..., Any]
    terms: Mapping[str, Term]
    leading: frozenset[str]
    linear_in: tuple[frozenset[str], ...]
    mapped: Callable[..., Any] | None

    @cached_property
    def signature(self):
        return signature(self.vjp.fun)

    @cached_property
    def arguments(self):
        """The names of the arguments that are arrays, in their order."""
        names = enumerate(self.signature.parameters)
        return [name for k, name in names if k not in self.vjp.nondiff_argnums]

    def check_names(self):
        kinds = {p.kind for p in self.signature.parameters.values()}
        if kinds - {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD}:
            raise TypeError(
                f"`op` must have positional arguments with names, got {self._name}"
                f"{self.signature}"
            )
        for name, term in self.terms.items():
            if term.contracted > 0 or (term.residual is None and term.contracted):
                raise ValueError(
                    f"`contracted` of `{name}` must be 0, or negative with a residual,"
                    f" got {term.contracted}"
                )
        for name, given in {
            "terms": {*self.terms},
            "linear_in": set().union(*self.linear_in),
        }.items():
            if unknown := sorted(given - {*self.arguments}):
                raise TypeError(
                    f"`{name}` must have names of the arguments of {self._name},"
                    f" {', '.join(self.arguments)}, got {', '.join(unknown)}"
                )

    def split(self, arguments):
        """The arrays, and the static arguments with their types, since 2 == 2.0."""
        places = self.vjp.nondiff_argnums
        arrays = [a for k, a in enumerate(arguments) if k not in places]
        for name, array in zip(self.arguments, arrays, strict=True):
            if array is not None and not jax.tree_util.all_leaves([array]):
                raise TypeError(
                    f"`{name}` of {self._name} must be an array or None, got"
                    f" {type(array).__name__}"
                )
        return arrays, tuple((type(arguments[k]), arguments[k]) for k in places)

    def joined(self, arrays, static):
        every = [*arrays]
        places = zip(self.vjp.nondiff_argnums, static, strict=True)
        for place, (_, value) in sorted(places, key=lambda both: both[0]):
            every.insert(place, value)
        return every

    def value(self, arrays, static):
        return self.vjp.fun(*self.joined(arrays, static))

    def forward(self, arrays, tangents, static, results):
        """The forward rule: the result, and the residuals that these tangents need."""
        check_rules(self.vjp)
        primals = [
            a if a is None else Primal(a, t is not None)
            for a, t in zip(arrays, tangents, strict=True)
        ]
        Y, residuals = self.vjp.fwd(*self.joined(primals, static))
        self._check_structure("forward rule", Y, results)
        return Y, residuals

    def tangent(self, static, residuals, tangents, results):
        """The differential, as a list of arrays."""
        dY = self.differential(*[v for _, v in static], residuals, tangents)
        self._check_structure("differential", dY, results)
        return jax.tree.leaves(dY)

    def _check_structure(self, rule, found, results):
        if jax.tree.structure(found) != results:
            raise TypeError(
                f"the {rule} of {self._name} must return what the op returns,"
                f" {results}, got {jax.tree.structure(found)}"
            )

    def check_results(self, rule, found, expected):
        """Refuse arrays whose shapes or dtypes are not those of the op's results."""
        for array, result in zip(found, expected, strict=True):
            dtype = result.dtype
            if rule == "differential" and not jnp.issubdtype(dtype, jnp.inexact):
                dtype = jax.dtypes.float0
            if (array.shape, array.dtype) != (result.shape, dtype):
                must, got = _text(result.shape, dtype), _text(array.shape, array.dtype)
                raise TypeError(
                    f"the {rule} of {self._name} must return {must}, got {got}"
                )

    def backward(self, static, residuals, G):
        """The backward rule: a cotangent or None for each argument that is an array."""
        cotangents = self.vjp.bwd(*[v for _, v in static], residuals, G)
        if not isinstance(cotangents, tuple) or len(cotangents) != len(self.arguments):
            names = ", ".join(f"`{name}`" for name in self.arguments)
            raise TypeError(
                f"the backward rule of {self._name} must return a tuple of the"
                f" cotangents of {names}, got {cotangents!r:.60}"
            )
        return cotangents

    def checked_cotangent(self, k, cotangent, expected, may_be_wide):
        """The cotangent of an argument, of its shape and dtype, or None for zero."""
        if cotangent is None:
            return None
        cotangent = jnp.asarray(cotangent)
        dtype = expected.dtype if may_be_wide else cotangent.dtype
        if (cotangent.shape, dtype) != (expected.shape, expected.dtype):
            raise TypeError(
                f"the backward rule of {self._name} must return a cotangent of"
                f" {_text(expected.shape, expected.dtype)} for `{self.arguments[k]}`,"
                f" got {_text(cotangent.shape, cotangent.dtype)}"
            )
        return cotangent.astype(dtype)

    def term(self, k):
        """What the cotangent of an argument reads, where that is said."""
        return self.terms.get(self.arguments[k])

    def residual(self, residuals, name):
        """The residual that a term reads."""
        fields = getattr(residuals, "_fields", ())
        if name is not None and name not in fields:
            raise TypeError(
                f"the residuals of {self._name} must be a named tuple with the field"
                f" `{name}`, which `terms` names, got {type(residuals).__name__}"
            )
        return None if name is None else getattr(residuals, name)

    @property
    def is_multilinear(self):
        """Whether the arguments are factors of products, or added to them."""
        if len(self.linear_in) != 2:
            return False
        first, second = self.linear_in
        is_split = bool(first - second) and bool(second - first)
        return is_split and first | second == {*self.arguments}

    def check_linear_in(self, names):
        if not any({*names} <= linear for linear in self.linear_in):
            raise TypeError(
                f"{self._name} must be linear in what it is transposed in, got"
                f" {' and '.join(sorted(names))}"
            )

    @property
    def _name(self):
        return getattr(self.vjp, "__name__", "the op")


def _text(shape, dtype):
    return f"{dtype}{[*shape]}"


# The primitive, by four rules.


# 1. The value. Being jitted, the op is traced once for each signature.


@partial(jax.jit, static_argnames=("op", "static", "tree", "levels"), inline=True)
def _value(*arrays, op, static, tree, levels):
    def value(arrays):
        return op.value(tree.unflatten(arrays), static)

    return under_levels(levels, value)([*arrays])


every_mode_p = OpenPrimitive("every_mode", _value, lambda *, tree, **_: tree.num_leaves)


# 2. The derivative: the forward rule, and a linear map of its residuals.


def _jvp(primals, tangents, *, call_jaxpr, **params):
    op, static, tree = params["op"], params["static"], params["tree"]
    primals = [*map(_as_array, primals)]  # Outside `jit` one may be a Python number.
    moving = [None if type(t) is ad.Zero else t for t in tangents]
    expected = every_mode_p.types(*primals, **params)
    results = jax.tree.structure(expected)

    def derivative(both):
        primals, tangents = map(tree.unflatten, both)
        Y, residuals = op.forward(primals, tangents, static, results)
        dY = linear_map(op, static, residuals, tangents, results)
        return jax.tree.leaves(Y), jax.tree.leaves(dY)

    Y, dY = under_levels(params["levels"], derivative, copies=2)([primals, moving])
    op.check_results("forward rule", Y, jax.tree.leaves(expected))
    op.check_results("differential", dY, jax.tree.leaves(expected))
    return Y, dY


ad.primitive_jvps[every_mode_p] = _jvp


# 3. The transpose, where the op is linear: that of its derivative, at zero.


def _transpose(cotangents, *arguments, call_jaxpr, **params):
    op = params["op"]
    unknown = {k: a.aval for k, a in enumerate(arguments) if ad.is_undefined_primal(a)}
    names = names_of_arrays(op, params["tree"])
    op.check_linear_in([names[k] for k in unknown])
    zeros = {k: ad.instantiate_zeros(ad.Zero(aval)) for k, aval in unknown.items()}

    def value(some):
        arrays = [some.get(k, argument) for k, argument in enumerate(arguments)]
        return every_mode_p.bind(*arrays, **params)

    _, vjp = jax.vjp(value, zeros)
    (found,) = vjp([ad.instantiate_zeros(c) for c in cotangents])
    return [found.get(k) for k in range(len(arguments))]


ad.primitive_transposes[every_mode_p] = _transpose


def names_of_arrays(op, tree):
    """The names of the arguments that are not None."""
    every = zip(op.arguments, tree.children(), strict=True)
    return [name for name, argument in every if argument.num_leaves]


# 4. What `jax.vmap` makes of it.


def _batch(axis, arrays, places, *, call_jaxpr, levels, **params):
    op = params["op"]
    if op.mapped and any(place is not None for place in places):
        return _batch_of_other(op, axis, arrays, places, params)
    has = [name in op.leading for name in names_of_arrays(op, params["tree"])]
    arrays, levels, place = batched(axis, arrays, places, has, levels)
    results = every_mode_p.bind(*arrays, levels=levels, **params)
    return results, [place] * len(results)


def _batch_of_other(op, axis, arrays, places, params):
    def other(arrays):
        every = op.joined(params["tree"].unflatten(arrays), params["static"])
        return jax.tree.leaves(op.mapped(*every))

    level = Level(tuple(places), axis.size, axis.name, axis.spmd_name)
    results = level.mapped(other, ([*places],))([*arrays])
    return results, [0] * len(results)


batching.fancy_primitive_batchers[every_mode_p] = _batch
