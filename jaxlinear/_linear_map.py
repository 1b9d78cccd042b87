"""A linear map that carries its own transpose: every mode for a custom VJP.

JAX differentiates forward, and transposes that for reverse mode. `jax.custom_vjp` puts
a rule in the place of both, and so has no forward mode; `jax.custom_jvp` has, but no
rule for reverse mode. What is missing is a tangent that carries its transpose.
`jax.custom_derivatives.linear_call` is one that cannot be mapped. With ours,

    @partial(custom_jvp_op.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        Y, residuals = forward_rule(*primals)
        return Y, linear_map(kind, residuals, tangents)

is differentiable in every mode: forward mode evaluates ``kind.apply``, reverse mode runs
``kind.transpose``, the backward rule, on the residuals. Those are all that is stored.

A primitive is known to JAX by its rules. The four below are its value, its derivative,
its transpose and what `jax.vmap` makes of it; a fifth is for Taylor series.
"""

from collections.abc import Callable, Hashable
from functools import partial
from math import comb
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.jet import jet_rules
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxlinear._product import accumulator


class Operand(NamedTuple):
    """Which residual multiplies an operand, and where an axis goes that it lacks.

    Where such an axis is mapped, the operand's cotangent is a sum over it. If the
    residual has it too, the product with the cotangent contracts it: one more axis at
    these places, which are counted in arrays without it.
    """

    residual: int | None
    place_in_residual: int = 0
    place_in_cotangent: int = 0


class LinearMap(NamedTuple):
    """The sum of products, each of a residual and an operand, or of an operand alone.

    It is data with a hash, not a closure: JAX's caches recognise an equal one.
    """

    apply: Callable  # of statics, residuals and operands, to an array
    transpose: Callable  # of statics, residuals and cotangent, to one for each operand
    operands: tuple[Operand, ...]
    leading: tuple  # of (residuals, operands): have they the result's leading axes?
    statics: Hashable


class Level(NamedTuple):
    """One `jax.vmap` around the map, over axis 0 of some arguments."""

    axes: tuple[int | None, ...]
    axis_size: int
    spmd_axis_name: Any

    def mapped(self, function, axes):
        size, name = self.axis_size, self.spmd_axis_name
        return jax.vmap(function, axes, axis_size=size, spmd_axis_name=name)


def linear_map(kind, residuals, operands):
    """``kind`` of tuples of arrays, and of None for what takes no part."""
    arguments, tree = jax.tree.flatten((residuals, operands))
    return linear_map_p.bind(*arguments, kind=kind, tree=tree, levels=())


linear_map_p = Primitive("linear_map")


def _slots(tree):
    """The number of each residual and operand among the arguments, or None."""
    return tree.unflatten(range(tree.num_leaves))


def _residual_count(tree):
    return len(jax.tree.leaves(_slots(tree)[0]))


# Its value. A jitted function is traced once for each signature.


@partial(jax.jit, static_argnames=("kind", "tree", "levels"), inline=True)
def _apply(*arguments, kind, tree, levels):
    def apply(*arguments):
        return kind.apply(kind.statics, *tree.unflatten(arguments))

    for level in levels:
        apply = level.mapped(apply, level.axes)
    return apply(*arguments)


@linear_map_p.def_abstract_eval
def _(*types, **params):
    return _apply.trace(*types, **params).jaxpr.out_avals[0]


linear_map_p.def_impl(_apply)
mlir.register_lowering(linear_map_p, mlir.lower_fun(_apply, multiple_results=False))


# Its derivative: the same map of the tangents of operands, so with the same transpose,
# and what JAX makes of ``apply`` for those of residuals.


def _jvp(primals, tangents, *, tree, **params):
    count = _residual_count(tree)
    bind = partial(linear_map_p.bind, tree=tree, **params)
    moving = {k: t for k, t in enumerate(tangents) if type(t) is not ad.Zero}
    residuals = {k: t for k, t in moving.items() if k < count}
    derivatives = []
    if len(moving) > len(residuals):
        operands = map(ad.instantiate_zeros, tangents[count:])
        derivatives.append(bind(*primals[:count], *operands))
    if residuals:

        def of(residuals):
            arguments = [residuals.get(k, p) for k, p in enumerate(primals)]
            return _apply(*arguments, tree=tree, **params)

        primal = {k: primals[k] for k in residuals}
        derivatives.append(jax.jvp(of, (primal,), (residuals,))[1])
    return bind(*primals), sum(derivatives[1:], derivatives[0])


ad.primitive_jvps[linear_map_p] = _jvp


# Its transpose: where the map is mapped, that of each operand by itself.


def _transpose(G, *arguments, kind, tree, levels):
    G = ad.instantiate_zeros(G)
    residuals, operands = tree.unflatten(arguments)
    if levels:
        cotangents = [
            None if operand is None else _cotangent(k, G, residuals, kind, tree, levels)
            for k, operand in enumerate(operands)
        ]
    else:
        cotangents = kind.transpose(kind.statics, residuals, G)
    return [None] * _residual_count(tree) + [
        cotangent if ad.is_undefined_primal(operand) else None
        for operand, cotangent in zip(operands, cotangents, strict=True)
        if operand is not None
    ]


ad.primitive_transposes[linear_map_p] = _transpose


def _cotangent(k, G, residuals, kind, tree, levels):
    """The cotangent of operand ``k``: one for each element over which it is mapped."""
    operand = kind.operands[k]
    residual_slots, operand_slots = _slots(tree)
    own = operand_slots[k]
    read = None if operand.residual is None else residual_slots[operand.residual]
    levels = levels[::-1]  # The axes of the outermost are the first.
    in_residual = [read is not None and level.axes[read] == 0 for level in levels]
    kept = [level.axes[own] == 0 for level in levels]
    # Neither the operand nor what it is multiplied by has these axes.
    summed = [
        axis
        for axis, (k_, r) in enumerate(zip(kept, in_residual, strict=True))
        if not k_ and not r and operand.residual is not None
    ]
    G = jnp.sum(G, summed, dtype=accumulator(G.dtype)) if summed else G

    def arranged(array, is_kept, place):
        """The kept axes first, the other mapped ones at their place among the rest."""
        axes = range(array.ndim)
        rest, mapped = axes[len(is_kept) :], axes[: len(is_kept)]
        first = [axis for axis in mapped if is_kept[axis]]
        others = [axis for axis in mapped if not is_kept[axis]]
        return array.transpose(*first, *rest[:place], *others, *rest[place:])

    of_G = [is_kept for axis, is_kept in enumerate(kept) if axis not in summed]
    G = arranged(G, of_G, operand.place_in_cotangent)
    residual = None
    if read is not None:
        of_residual = [i for i, present in zip(kept, in_residual, strict=True) if present]
        residual = arranged(
            residuals[operand.residual], of_residual, operand.place_in_residual
        )

    def transpose(residual, G):
        alone = [residual if r == operand.residual else None for r in range(len(residuals))]
        return kind.transpose(kind.statics, tuple(alone), G)[k]

    for level, is_kept, present in reversed(list(zip(levels, kept, in_residual, strict=True))):
        if is_kept:
            transpose = level.mapped(transpose, (0 if present else None, 0))
    return transpose(residual, G)


# What `jax.vmap` makes of it. Where all that have leading axes are mapped, and nothing
# else, the axis is one more of these, and there is one cotangent of the others.


def _batch(axis, arguments, places, *, kind, tree, levels):
    bind = partial(linear_map_p.bind, kind=kind, tree=tree)
    mapped = [place is not None for place in places]
    if not any(mapped):
        return bind(*arguments, levels=levels), None
    slots = zip(jax.tree.leaves(kind.leading), _all_slots(kind, tree), strict=True)
    if mapped == [leading for leading, slot in slots if slot is not None]:
        arguments = [
            a if place is None else jnp.moveaxis(a, place, _depth(k, levels))
            for k, (a, place) in enumerate(zip(arguments, places, strict=True))
        ]
        return bind(*arguments, levels=levels), len(levels)
    arguments = [
        a if place is None else jnp.moveaxis(a, place, 0)
        for a, place in zip(arguments, places, strict=True)
    ]
    axes = tuple(0 if is_mapped else None for is_mapped in mapped)
    level = Level(axes, axis.size, axis.spmd_name)
    return bind(*arguments, levels=(*levels, level)), 0


def _all_slots(kind, tree):
    residuals, operands = _slots(tree)
    return [*residuals, *operands]


def _depth(k, levels):
    """Over how many axes argument ``k`` is mapped."""
    return sum(level.axes[k] == 0 for level in levels)


batching.fancy_primitive_batchers[linear_map_p] = _batch


# What `jax.experimental.jet` makes of it: Leibniz' rule, for the derivatives of a
# product. An operand alone has no other factor.


def _jet(primals, series, *, kind, tree, levels):
    derivatives = [[p, *s] for p, s in zip(primals, series, strict=True)]
    count = _residual_count(tree)
    alone = {
        slot
        for slot, operand in zip(_slots(tree)[1], kind.operands, strict=True)
        if operand.residual is None
    }

    def term(i, j):
        """Of the residuals' derivative number i and the operands' number j."""
        arguments = [d[i if k < count else j] for k, d in enumerate(derivatives)]
        if i > 0:
            arguments = [
                jnp.zeros_like(a) if k in alone else a for k, a in enumerate(arguments)
            ]
        return linear_map_p.bind(*arguments, kind=kind, tree=tree, levels=levels)

    first, *rest = (
        sum(comb(order, i) * term(i, order - i) for i in range(order + 1))
        for order in range(len(derivatives[0]))
    )
    return first, rest


jet_rules[linear_map_p] = _jet
