"""The tangent of an op: a linear map that carries its own transpose.

JAX differentiates forward, and transposes that for reverse mode. `jax.custom_vjp` puts
a rule in the place of both, and so has no forward mode; `jax.custom_jvp` has it, but no
rule for reverse mode. A tangent that carries its transpose has both.
`jax.custom_derivatives.linear_call` makes one, but `jax.vmap` does not know it. So this
is a primitive, and JAX knows it by four rules: value, derivative, transpose, batching.
"""

from functools import cache, partial

import jax
from jax.interpreters import ad, batching

from .levels import batched, cotangent, under_levels
from .open import OpenPrimitive


def linear_map(op, static, residuals, tangents, results):
    """The differential of ``op`` as one equation: its transpose is the backward rule.

    Tangents that are None take no part and have no cotangent. ``results`` is the tree
    structure of Y and dY.
    """
    arrays, tree = jax.tree.flatten((residuals, tangents))
    parameters = {"static": static, "tree": tree, "results": results, "levels": ()}
    return jax.tree.unflatten(results, linear_map_p.bind(*arrays, op=op, **parameters))


@cache
def slots_of(tree):
    """The slot of every array: which residual or tangent it is, or is a part of."""
    residuals, tangents = tree.unflatten(range(tree.num_leaves))
    every = enumerate((*one_level(residuals)[0], *tangents))
    return tuple(slot for slot, held in every for _ in jax.tree.leaves(held))


def one_level(residuals):
    """What the residuals, a tree, consist of, and the structure of only that."""
    return jax.tree.flatten(residuals, is_leaf=lambda node: node is not residuals)


# 1. The value. Being jitted, the differential is traced once for each signature.


@partial(
    jax.jit, static_argnames=("op", "static", "tree", "results", "levels"), inline=True
)
def _value(*arrays, op, static, tree, results, levels):
    def differential(arrays):
        residuals, tangents = tree.unflatten(arrays)
        return op.tangent(static, residuals, tangents, results)

    return under_levels(levels, slots_of(tree), differential)([*arrays])


linear_map_p = OpenPrimitive("linear_map", _value, lambda *, tree, **_: tree.num_leaves)


# 2. The derivative, that of a product: of the tangents the same map, which keeps the
# transpose, and of the residuals what JAX makes of the differential.


def _jvp(primals, tangents, *, call_jaxpr, **params):
    count = len(jax.tree.leaves(params["tree"].unflatten(primals)[0]))
    moving = {k: t for k, t in enumerate(tangents) if type(t) is not ad.Zero}
    of_residuals = {k: t for k, t in moving.items() if k < count}

    def value(some):
        arrays = [some.get(k, primal) for k, primal in enumerate(primals)]
        return _value(*arrays, **params)

    parts = []
    if len(moving) > len(of_residuals):
        operands = map(ad.instantiate_zeros, tangents[count:])
        parts.append(linear_map_p.bind(*primals[:count], *operands, **params))
    if of_residuals:
        at = {k: primals[k] for k in of_residuals}
        parts.append(jax.jvp(value, (at,), (of_residuals,))[1])
    summed = [sum(part[1:], part[0]) for part in zip(*parts, strict=True)]
    return linear_map_p.bind(*primals, **params), summed


ad.primitive_jvps[linear_map_p] = _jvp


# 3. The transpose: the backward rule, or under `jax.vmap` one for each operand.


def _transpose(cotangents, *arguments, op, static, tree, results, levels, call_jaxpr):
    G = jax.tree.unflatten(results, map(ad.instantiate_zeros, cotangents))
    residuals, operands = tree.unflatten(arguments)
    kept, structure = one_level(residuals)
    wanted = {k: o.aval for k, o in enumerate(operands) if ad.is_undefined_primal(o)}

    def backward(kept, G):
        return op.backward(static, structure.unflatten(kept), G)

    def under_vmap(k):
        def backward_of_one(kept, G):
            return backward(kept, G)[k]

        read, contracted = op.reads(k, residuals)
        slot = len(kept) + k
        return cotangent(backward_of_one, slot, read, contracted, kept, G, levels)

    every = {k: under_vmap(k) for k in wanted} if levels else backward(kept, G)
    found = {k: op.checked_cotangent(k, every[k], t, levels) for k, t in wanted.items()}
    return [found.get(slot - len(kept)) for slot in slots_of(tree)]


ad.primitive_transposes[linear_map_p] = _transpose


# 4. What `jax.vmap` makes of it.


def _batch(axis, arrays, places, *, call_jaxpr, levels, **params):
    op, tree = params["op"], params["tree"]
    residuals, _ = tree.unflatten(range(tree.num_leaves))
    slots, has = slots_of(tree), op.has_leading_axes(residuals)
    arrays, levels, place = batched(axis, arrays, places, slots, has, levels)
    results = linear_map_p.bind(*arrays, levels=levels, **params)
    return results, [place] * len(results)


batching.fancy_primitive_batchers[linear_map_p] = _batch
