"""A linear map that carries its own transpose: every mode for a custom VJP.

JAX differentiates forward, and transposes that for reverse mode. `jax.custom_vjp` puts
a rule in the place of both, and so has no forward mode; `jax.custom_jvp` has it, but no
rule for reverse mode. What is missing is a tangent that carries its transpose, which
`jax.custom_derivatives.linear_call` is, but not for `jax.vmap`. With ours an op is
differentiable in every mode if its derivative is

    Y, residuals = forward_rule(*primals)
    dY = linear_map(differential, residuals, tangents)

Forward mode evaluates ``differential.apply``, and reverse mode runs its ``transpose``,
the backward rule; only residuals are stored. An op that is linear in some arguments is
such a map itself, with that derivative. JAX knows the primitive by its four rules.
"""

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import NamedTuple

import jax
from jax.interpreters import ad, batching

from jaxlinear._levels import Level, cotangents, depth, mapped_over, to_axis
from jaxlinear._open import OpenPrimitive


class Term(NamedTuple):
    """The product of an operand and of one residual, or of none."""

    residual: int | None
    # Of an axis that is mapped in the residual alone: there it is made the first.
    cotangent_axis: int = 0


class LinearMap(NamedTuple):
    """A sum of terms, one for each operand: data with a hash, for JAX's caches."""

    apply: Callable  # of statics, residuals and operands: an array
    transpose: Callable  # of statics, residuals and cotangent: one for each operand
    terms: tuple[Term, ...]
    leading: tuple[bool, ...]  # of residuals, operands: with the result's leading axes?
    statics: Hashable
    derivative: Callable | None = None  # of statics, primals and tangents: Y and dY


def linear_map(kind, residuals, operands):
    """``kind`` of arrays. Those that are None take no part, and have no cotangent."""
    arrays, tree = jax.tree.flatten(((*residuals,), (*operands,)))
    return linear_map_p.bind(*arrays, kind=kind, tree=tree, levels=())[0]


@cache
def slots_of(tree):
    """Which residual or operand each array is, or a part of."""
    residuals, operands = tree.unflatten(range(tree.num_leaves))
    every = enumerate((*residuals, *operands))
    return tuple(slot for slot, arrays in every for _ in jax.tree.leaves(arrays))


# 1. The value. Being jitted, ``apply`` is traced once for each signature.


@partial(jax.jit, static_argnames=("kind", "tree", "levels"), inline=True)
def _apply(*arguments, kind, tree, levels):
    def apply(arguments):
        return kind.apply(kind.statics, *tree.unflatten(arguments))

    return [mapped_over(levels, slots_of(tree), apply)([*arguments])]


linear_map_p = OpenPrimitive("linear_map", _apply, lambda *, tree, **_: tree.num_leaves)


# 2. The derivative: the map's own, if it has one. Else that of products: the same map
# of the operands' tangents, which keeps the transpose, and of the residuals' what JAX
# makes of ``apply``.


def _jvp(primals, tangents, *, kind, tree, levels, **_):
    moving = [None if type(t) is ad.Zero else t for t in tangents]
    if kind.derivative is None:
        return _jvp_of_products(primals, tangents, moving, kind, tree, levels)

    def derivative(both):
        return kind.derivative(kind.statics, *map(tree.unflatten, both))

    function = mapped_over(levels, slots_of(tree), derivative, copies=2)
    Y, dY = function([[*primals], moving])
    return [Y], [dY]


def _jvp_of_products(primals, tangents, moving, kind, tree, levels):
    bind = partial(linear_map_p.bind, kind=kind, tree=tree, levels=levels)
    apply = partial(_apply, kind=kind, tree=tree, levels=levels)
    count = len(jax.tree.leaves(tree.unflatten(primals)[0]))
    residuals = {k: t for k, t in enumerate(moving[:count]) if t is not None}

    def of_residuals(some):
        return apply(*(some.get(k, primal) for k, primal in enumerate(primals)))[0]

    dY = []
    if any(t is not None for t in moving[count:]):
        dY += bind(*primals[:count], *map(ad.instantiate_zeros, tangents[count:]))
    if residuals:
        of = {k: primals[k] for k in residuals}
        dY += [jax.jvp(of_residuals, (of,), (residuals,))[1]]
    return bind(*primals), [sum(dY[1:], dY[0])]


ad.primitive_jvps[linear_map_p] = _jvp


# 3. The transpose: ``transpose``, or that of each operand by itself where it is mapped.


def _transpose(results, *arguments, kind, tree, levels, **_):
    (G,) = results
    residuals, operands = tree.unflatten(arguments)
    wanted = [k for k, o in enumerate(operands) if ad.is_undefined_primal(o)]
    found = cotangents(wanted, ad.instantiate_zeros(G), residuals, kind, levels)
    return [found.get(slot - len(residuals)) for slot in slots_of(tree)]


ad.primitive_transposes[linear_map_p] = _transpose


# 4. What `jax.vmap` makes of it. Where all that have leading axes are mapped, and
# nothing else, the axis is one more of these: the others have one cotangent, a sum.


def _batch(axis, arguments, places, *, kind, tree, levels, **_):
    bind, slots = partial(linear_map_p.bind, kind=kind, tree=tree), slots_of(tree)
    mapped = {s for s, p in zip(slots, places, strict=True) if p is not None}
    if not mapped:
        return bind(*arguments, levels=levels), [None]
    if mapped == {slot for slot in slots if kind.leading[slot]}:
        # Behind the axes of the levels, which are the first.
        to, place = [depth(levels, slot) for slot in slots], len(levels)
    else:
        to, place = [0] * len(slots), 0
        axes = tuple(0 if s in mapped else None for s in range(len(kind.leading)))
        levels = (*levels, Level(axes, axis.size, axis.spmd_name))
    return bind(*map(to_axis, arguments, places, to), levels=levels), [place]


batching.fancy_primitive_batchers[linear_map_p] = _batch
