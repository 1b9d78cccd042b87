"""A linear map that carries its own transpose: every mode for a custom VJP.

JAX differentiates forward, and transposes that for reverse mode. `jax.custom_vjp` puts a
rule in the place of both, and so has no forward mode; `jax.custom_jvp` has it, but no
rule for reverse mode. What is missing is a tangent that carries its transpose.
`jax.custom_derivatives.linear_call` is one, but `jax.vmap` does not know it. With ours
an op is differentiable in every mode if its derivative is

    Y, residuals = forward_rule(*primals)
    dY = linear_map(differential, residuals, tangents)

Forward mode evaluates ``differential.apply``, and reverse mode runs its ``transpose``,
the backward rule. Nothing is stored but the residuals. An op that is linear in some
arguments is such a map itself, with that derivative, and can be transposed, too.

JAX knows a primitive by its rules. The four are below, each with what it does.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxlinear._product import accumulator


class Term(NamedTuple):
    """The product of an operand and of one residual, or of none.

    Where an axis is mapped in the residual and not in the operand, the operand's
    cotangent contracts it. It is then one more axis of both: the first of the residual,
    and of the cotangent the first, or the one before the last.
    """

    residual: int | None
    cotangent_axis: int = 0


class LinearMap(NamedTuple):
    """A sum of terms, one for each operand. Data with a hash, which JAX's caches know."""

    apply: Callable  # of statics, residuals and operands: an array
    transpose: Callable  # of statics, residuals and cotangent: one for each operand
    terms: tuple[Term, ...]
    leading: tuple[bool, ...]  # of residuals, operands: with the result's leading axes?
    statics: Hashable
    derivative: Callable | None = (
        None  # of statics, primals, tangents or None: Y and dY
    )


class Level(NamedTuple):
    """One `jax.vmap` around a map, over the first axis of what has a 0 in ``axes``."""

    axes: tuple[int | None, ...]
    axis_size: int
    spmd_axis_name: Any

    def mapped(self, function, axes):
        size, name = self.axis_size, self.spmd_axis_name
        return jax.vmap(function, axes, axis_size=size, spmd_axis_name=name)


linear_map_p = Primitive("linear_map")


def linear_map(kind, residuals, operands):
    """``kind`` of arrays. Those that are None take no part, and have no cotangent."""
    slots = [s for s, a in enumerate((*residuals, *operands)) if a is not None]
    arguments = [a for a in (*residuals, *operands) if a is not None]
    return linear_map_p.bind(*arguments, kind=kind, slots=tuple(slots), levels=())


def split(kind, slots, arguments):
    """The residuals and the operands, with None in the place of those not there."""
    present = dict(zip(slots, arguments, strict=True))
    every = [present.get(slot) for slot in range(len(kind.leading))]
    return every[: -len(kind.terms)], every[-len(kind.terms) :]


# 1. The value. Being jitted, ``apply`` is traced once for each signature.


@partial(jax.jit, static_argnames=("kind", "slots", "levels"), inline=True)
def _apply(*arguments, kind, slots, levels):
    def apply(*arguments):
        return kind.apply(kind.statics, *split(kind, slots, arguments))

    for level in levels:
        apply = level.mapped(apply, tuple(level.axes[slot] for slot in slots))
    return apply(*arguments)


linear_map_p.def_impl(_apply)
linear_map_p.def_abstract_eval(lambda *a, **p: _apply.trace(*a, **p).jaxpr.out_avals[0])
mlir.register_lowering(linear_map_p, mlir.lower_fun(_apply, multiple_results=False))


# 2. The derivative: the map's own, if it has one. Else that of a product: the same map of
# the operands' tangents, which keeps the transpose, and what JAX makes of ``apply`` for
# those of residuals.


def _jvp(primals, tangents, *, kind, slots, levels):
    moving = {k: t for k, t in enumerate(tangents) if type(t) is not ad.Zero}
    moving = {k: t for k, t in moving.items() if t.dtype != jax.dtypes.float0}

    def own(primals, moving):
        tangents = [moving.get(k) for k in range(len(slots))]
        both = [sum(split(kind, slots, a), []) for a in (primals, tangents)]
        return kind.derivative(kind.statics, *both)

    def of_product(primals, moving):
        params = {"kind": kind, "slots": slots, "levels": levels}
        count = len(jax.tree.leaves(split(kind, slots, slots)[0]))
        residuals = {k: t for k, t in moving.items() if k < count}

        def of(residuals):
            arguments = [residuals.get(k, p) for k, p in enumerate(primals)]
            return _apply(*arguments, **params)

        dY = []
        if len(moving) > len(residuals):
            operands = map(ad.instantiate_zeros, tangents[count:])
            dY += [linear_map_p.bind(*primals[:count], *operands, **params)]
        if residuals:
            dY += [jax.jvp(of, ({k: primals[k] for k in residuals},), (residuals,))[1]]
        return linear_map_p.bind(*primals, **params), sum(dY[1:], dY[0])

    if kind.derivative is None:
        return of_product(primals, moving)
    for level in levels:
        axes = [level.axes[slot] for slot in slots]
        own = level.mapped(own, (axes, {k: axes[k] for k in moving}))
    return own(list(primals), moving)


ad.primitive_jvps[linear_map_p] = _jvp


# 3. The transpose: ``transpose``, or that of each operand by itself where it is mapped.


def _transpose(G, *arguments, kind, slots, levels):
    G = ad.instantiate_zeros(G)
    residuals, operands = split(kind, slots, arguments)
    wanted = [k for k, o in enumerate(operands) if ad.is_undefined_primal(o)]
    if levels:
        found = {k: _cotangent(k, G, residuals, kind, levels) for k in wanted}
    else:
        found = dict(enumerate(kind.transpose(kind.statics, residuals, G)))
    found = {len(residuals) + k: found[k] for k in wanted}
    return [found.get(slot) for slot in slots]


def _cotangent(k, G, residuals, kind, levels):
    """The cotangent of operand ``k``: an array for each element that it has."""
    read, cotangent_axis = kind.terms[k]

    def product(residual, G):
        alone = [residual if r == read else None for r in range(len(residuals))]
        return kind.transpose(kind.statics, alone, G)[k]

    def around(product, level, depth, residual_depth):
        in_residual = read is not None and level.axes[read] == 0
        if level.axes[len(residuals) + k] == 0:
            return level.mapped(product, (0 if in_residual else None, 0))

        def contracted(residual, G):
            if in_residual:
                residual = jnp.moveaxis(residual, 0, residual_depth)
            elif read is not None:
                return product(residual, jnp.sum(G, 0, dtype=accumulator(G.dtype)))
            place = depth if cotangent_axis == 0 else cotangent_axis
            return product(residual, jnp.moveaxis(G, 0, place))

        return contracted

    for depth, level in enumerate(levels):
        outer = [] if read is None else [l for l in levels[:depth] if l.axes[read] == 0]
        product = around(product, level, depth, len(outer))
    return product(None if read is None else residuals[read], G)


ad.primitive_transposes[linear_map_p] = _transpose


# 4. What `jax.vmap` makes of it. Where all that have leading axes are mapped, and nothing
# else, the axis is one more of these: of the others there is one cotangent, a sum.


def _batch(axis, arguments, places, *, kind, slots, levels):
    mapped = [place is not None for place in places]
    is_leading = mapped == [kind.leading[slot] for slot in slots]
    if any(mapped) and not is_leading:
        present = dict(zip(slots, mapped, strict=True))
        axes = [0 if present.get(slot) else None for slot in range(len(kind.leading))]
        levels += (Level(tuple(axes), axis.size, axis.spmd_name),)
    arguments = [
        # Behind the axes of the levels, which are the first.
        jnp.moveaxis(a, place, sum(l.axes[slot] == 0 for l in levels) * is_leading)
        if is_mapped
        else a
        for slot, a, place, is_mapped in zip(
            slots, arguments, places, mapped, strict=True
        )
    ]
    Y = linear_map_p.bind(*arguments, kind=kind, slots=slots, levels=levels)
    return Y, (len(levels) * is_leading if any(mapped) else None)


batching.fancy_primitive_batchers[linear_map_p] = _batch
