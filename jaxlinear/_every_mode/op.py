"""An op that JAX differentiates by the rules of its `jax.custom_vjp`, in every mode."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching

from .levels import Term, batched, under_levels
from .linear_map import linear_map
from .open import OpenPrimitive


def in_every_mode(
    op: Callable[..., Any],
    differential: Callable[..., Any],
    *,
    terms: Mapping[str, Term] | None = None,
    leading: Collection[str] = (),
    linear_in: Collection[Collection[str]] = (),
) -> Callable[..., Any]:
    """The function of ``op``, differentiable in every mode by the rules of ``op``.

    Write a `jax.custom_vjp` and its differential::

        op.defvjp(forward, backward, symbolic_zeros=True)

        forward :: primals, *static -> result, residuals
        backward :: *static, residuals, cotangent of the result -> cotangents
        differential :: *static, residuals, tangents -> tangent of the result

    Reverse mode runs the forward and the backward rule, forward mode the forward rule
    and the differential, and what is not differentiated the function of ``op``. All
    modes combine, to any order, under `jax.vmap`, `jax.checkpoint`, `jax.shard_map` and
    the loops of `jax.lax`. Only what the forward rule returns as residuals is kept.

    ``primals`` and ``tangents`` are in the order of the arguments. A primal has a
    ``value`` and says whether it is ``perturbed``; the tangent of any other is None.
    Residuals may differ in their structure with what is perturbed. Arguments and
    results are arrays, the results in any tree; an argument may be None, and its primal
    is then None.

    The next three tell `jax.vmap` and `jax.linear_transpose` what the rules can do. The
    gradients are right without them.

    Args:
      op: a `jax.custom_vjp` with its rules. Its static arguments, those of
        ``nondiff_argnums``, have a hash.
      differential: the derivative of ``op`` along ``tangents``, of which one at least
        is not None. It is linear in them.
      terms: for the name of an argument what its cotangent reads. It saves a cotangent
        for each mapped element where the argument is not mapped. Residuals that are
        named are fields of a named tuple.
      leading: the names of the arguments and residuals that have the leading axes of
        the result, if the rules work with any number of them. Where all of these are
        mapped, and nothing else, the mapped axis becomes one more leading axis.
      linear_in: sets of names: in the arguments of each of them together ``op`` is
        linear, so that `jax.linear_transpose` takes it.

    Returns:
      The function, with the arguments of ``op``.

    Raises:
      TypeError: if ``op`` is not such an object, or a name is not one of its arguments;
        later if a rule returns something of another structure, shape or dtype than it
        must.
    """
    if not isinstance(op, jax.custom_vjp) or not op.symbolic_zeros:
        raise TypeError(
            "`op` must be a jax.custom_vjp with rules by"
            f" `op.defvjp(forward, backward, symbolic_zeros=True)`, got {op!r:.60}"
        )
    sets = tuple(map(frozenset, linear_in))
    checked = Op(op, differential, dict(terms or {}), frozenset(leading), sets)
    checked.check_names()

    def in_any_mode(*args, **kwargs):
        every = signature(op.fun).bind(*args, **kwargs)
        every.apply_defaults()
        places = [*op.nondiff_argnums]
        static = tuple(every.args[k] for k in places)
        arrays = [a for k, a in enumerate(every.args) if k not in places]
        arrays, tree = jax.tree.flatten(varying_together(arrays))
        return every_mode_p.tree(
            *arrays, op=checked, static=static, tree=tree, levels=()
        )

    return in_any_mode


def varying_together(arrays):
    """The arrays, cast to vary over the manual axes of them all.

    JAX transposes the cast into the sum of a cotangent over the axes of
    `jax.shard_map` along which its primal does not vary.
    """
    arrays = jax.tree.map(jnp.asarray, arrays)
    varying = [jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def cast(a):
        missing = axes - jax.typeof(a).manual_axis_type.varying
        return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return jax.tree.map(cast, arrays)


@dataclasses.dataclass(frozen=True)
class Primal:
    """An argument as a forward rule reads it, whether it is ``perturbed`` included."""

    value: Any
    perturbed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """What :func:`jaxlinear._every_mode.in_every_mode` is given.

    The rules are read from the `jax.custom_vjp` each time that they run.
    """

    vjp: Any  # A `jax.custom_vjp` with its rules.
    differential: Callable[..., Any]
    terms: Mapping[str, Term]
    leading: frozenset[str]
    linear_in: tuple[frozenset[str], ...]

    @cached_property
    def arguments(self):
        """The names of the arguments that are arrays, in their order."""
        names = enumerate(signature(self.vjp.fun).parameters)
        return [name for k, name in names if k not in self.vjp.nondiff_argnums]

    def check_names(self):
        known = {*self.arguments}
        for name, given in {
            "terms": self.terms,
            "linear_in": set().union(*self.linear_in),
        }.items():
            if unknown := sorted({*given} - known):
                raise TypeError(
                    f"`{name}` must have names of the arguments of {self._name},"
                    f" {', '.join(self.arguments)}, got {', '.join(unknown)}"
                )

    def value(self, arrays, static):
        return self.vjp.fun(*self._with_static(arrays, static))

    def forward(self, arrays, tangents, static):
        """The forward rule: the result, and the residuals of these tangents."""
        primals = [
            a if a is None else Primal(a, t is not None)
            for a, t in zip(arrays, tangents, strict=True)
        ]
        return self.vjp.fwd(*self._with_static(primals, static))

    def tangent(self, static, residuals, tangents, results):
        """The differential, as a list of arrays."""
        dY = self.differential(*static, residuals, tangents)
        found = jax.tree.structure(dY)
        if found != results:
            raise TypeError(
                f"the differential of {self._name} must return what the op returns,"
                f" {results}, got {found}"
            )
        return jax.tree.leaves(dY)

    def backward(self, static, residuals, G):
        """The backward rule: a cotangent or None for each argument that is an array."""
        cotangents = self.vjp.bwd(*static, residuals, G)
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
        dtype = expected.dtype if may_be_wide else cotangent.dtype
        if (cotangent.shape, dtype) != (expected.shape, expected.dtype):
            raise TypeError(
                f"the backward rule of {self._name} must return a cotangent of"
                f" {expected.dtype}{[*expected.shape]} for `{self.arguments[k]}`, got"
                f" {cotangent.dtype}{[*cotangent.shape]}"
            )
        return cotangent.astype(dtype)

    def reads(self, k, residuals):
        """Which residuals the cotangent of an argument reads, and how it contracts."""
        term = self.terms.get(self.arguments[k])
        if term is None:
            return range(len(residuals)), None
        name = term.residual
        return [] if name is None else [residuals._fields.index(name)], term.contracted

    def has_leading_axes(self, residuals=()):
        """Of each residual and each argument: whether it has those of the result."""
        names = getattr(residuals, "_fields", (None,) * len(residuals))
        return [name in self.leading for name in (*names, *self.arguments)]

    def check_linear_in(self, slots):
        names = {self.arguments[slot] for slot in slots}
        if not any(names <= linear for linear in self.linear_in):
            raise TypeError(
                f"{self._name} must be linear in what it is transposed in, got"
                f" {' and '.join(sorted(names))}"
            )

    @property
    def _name(self):
        return getattr(self.vjp, "__name__", "the op")

    def _with_static(self, arrays, static):
        every = [*arrays]
        places = zip(self.vjp.nondiff_argnums, static, strict=True)
        for place, value in sorted(places, key=lambda both: both[0]):
            every.insert(place, value)
        return every


# The primitive, by four rules.


# 1. The value. Being jitted, the op is traced once for each signature.


@partial(jax.jit, static_argnames=("op", "static", "tree", "levels"), inline=True)
def _value(*arrays, op, static, tree, levels):
    def value(arrays):
        return op.value(tree.unflatten(arrays), static)

    return under_levels(levels, slots_of_op(tree), value)([*arrays])


every_mode_p = OpenPrimitive("every_mode", _value, lambda *, tree, **_: tree.num_leaves)


def slots_of_op(tree):
    arguments = tree.unflatten(range(tree.num_leaves))
    return [slot for slot, array in enumerate(arguments) if array is not None]


# 2. The derivative: the forward rule, and a linear map of its residuals.


def _jvp(primals, tangents, *, op, static, tree, levels, call_jaxpr):
    moving = [None if type(t) is ad.Zero else t for t in tangents]

    def derivative(both):
        primals, tangents = map(tree.unflatten, both)
        Y, residuals = op.forward(primals, tangents, static)
        results = jax.tree.structure(Y)
        dY = linear_map(op, static, residuals, tangents, results)
        return jax.tree.leaves(Y), jax.tree.leaves(dY)

    slots = slots_of_op(tree)
    return under_levels(levels, slots, derivative, copies=2)([[*primals], moving])


ad.primitive_jvps[every_mode_p] = _jvp


# 3. The transpose, where the op is linear: that of its derivative, at zero.


def _transpose(cotangents, *arguments, call_jaxpr, **params):
    op, tree = params["op"], params["tree"]
    unknown = {k: a.aval for k, a in enumerate(arguments) if ad.is_undefined_primal(a)}
    op.check_linear_in(
        [slot for k, slot in enumerate(slots_of_op(tree)) if k in unknown]
    )
    zeros = {k: ad.instantiate_zeros(ad.Zero(aval)) for k, aval in unknown.items()}

    def value(some):
        arrays = [some.get(k, argument) for k, argument in enumerate(arguments)]
        return every_mode_p.bind(*arrays, **params)

    _, vjp = jax.vjp(value, zeros)
    (found,) = vjp([ad.instantiate_zeros(c) for c in cotangents])
    return [found.get(k) for k in range(len(arguments))]


ad.primitive_transposes[every_mode_p] = _transpose


# 4. What `jax.vmap` makes of it.


def _batch(axis, arrays, places, *, call_jaxpr, levels, **params):
    op, slots = params["op"], slots_of_op(params["tree"])
    has = op.has_leading_axes()
    arrays, levels, place = batched(axis, arrays, places, slots, has, levels)
    results = every_mode_p.bind(*arrays, levels=levels, **params)
    return results, [place] * len(results)


batching.fancy_primitive_batchers[every_mode_p] = _batch
