"""The tangent of an op: a linear map that carries its own transpose.

JAX differentiates forward, and transposes that for reverse mode. `jax.custom_vjp` puts
a rule in the place of both, and so has no forward mode; `jax.custom_jvp` has it, but no
rule for reverse mode. A tangent that carries its transpose has both.
`jax.custom_derivatives.linear_call` makes one, but `jax.vmap` does not know it. So this
is a primitive, and JAX knows it by four rules: value, derivative, transpose, batching.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from .levels import batched, contracted_cotangent, mapped_cotangents, under_levels
from .open import OpenPrimitive


def linear_map(op, static, residuals, tangents, results):
    """The differential of ``op`` as one equation: its transpose is the backward rule.

    Tangents that are None take no part and have no cotangent. ``results`` is the tree
    structure of Y and dY.
    """
    arrays, tree = jax.tree.flatten((residuals, tangents))
    parameters = {"static": static, "tree": tree, "results": results, "levels": ()}
    return jax.tree.unflatten(results, linear_map_p.bind(*arrays, op=op, **parameters))


# 1. The value. Being jitted, the differential is traced once for each signature.


@partial(
    jax.jit, static_argnames=("op", "static", "tree", "results", "levels"), inline=True
)
def _value(*arrays, op, static, tree, results, levels):
    def differential(arrays):
        residuals, tangents = tree.unflatten(arrays)
        return op.tangent(static, residuals, tangents, results)

    return under_levels(levels, differential)([*arrays])


linear_map_p = OpenPrimitive("linear_map", _value, lambda *, tree, **_: tree.num_leaves)


# 2. The derivative, by the product rule: in the tangents the same map, which keeps its
# transpose, and in the residuals what JAX derives from the differential.


def _jvp(primals, tangents, *, call_jaxpr, **params):
    count = params["tree"].children()[0].num_leaves
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
    summed = [_sum(part) for part in zip(*parts, strict=True)]
    return linear_map_p.bind(*primals, **params), summed


def _sum(parts):
    first, *rest = parts
    return first if first.dtype == jax.dtypes.float0 else sum(rest, first)


ad.primitive_jvps[linear_map_p] = _jvp


# 3. The transpose: the backward rule, or what `jax.vmap` makes of it.


def _transpose(cotangents, *arguments, op, static, tree, results, levels, call_jaxpr):
    G = jax.tree.unflatten(results, map(ad.instantiate_zeros, cotangents))
    residuals, operands = tree.unflatten(arguments)
    there = [k for k, operand in enumerate(operands) if operand is not None]
    wanted = {k: operands[k].aval for k in there if ad.is_undefined_primal(operands[k])}
    if levels:
        first = len(arguments) - len(there)
        places = {k: first + place for place, k in enumerate(there) if k in wanted}
        every = _cotangents_under_levels(op, static, residuals, places, G, levels)
    else:
        every = op.backward(static, residuals, G)
    found = {k: op.checked_cotangent(k, every[k], t, levels) for k, t in wanted.items()}
    return [None] * (len(arguments) - len(there)) + [found.get(k) for k in there]


def _cotangents_under_levels(op, static, residuals, places, G, levels):
    arrays, structure = jax.tree.flatten(residuals)
    names = _names_of_residuals(jax.tree.structure(residuals))

    def backward(arrays, G):
        return op.backward(static, structure.unflatten(arrays), G)

    mapped = {k: place for k, place in places.items() if op.term(k) is None}
    found = mapped_cotangents(backward, mapped, arrays, G, levels) if mapped else {}
    for k in places.keys() - mapped.keys():
        name, contracted = op.term(k)
        reads = [place for place, held in enumerate(names) if name and held == name]
        read, one = jax.tree.flatten(op.residual(residuals, name))

        def backward_of_one(arrays, G, k=k, name=name, one=one):
            only = dict.fromkeys(residuals._fields)
            only |= {name: one.unflatten(arrays)} if name else {}
            return op.backward(static, residuals._replace(**only), G)[k]

        found[k] = contracted_cotangent(
            backward_of_one, places[k], reads, contracted, read, G, levels
        )
    return found


ad.primitive_transposes[linear_map_p] = _transpose


def _names_of_residuals(tree):
    """For each array the name of the residual that it is, or is a part of."""
    kind, _ = tree.node_data() or (None, None)
    children = [tree] if kind is None else tree.children()
    names = getattr(kind, "_fields", (None,) * len(children))
    every = zip(names, children, strict=True)
    return [name for name, child in every for _ in range(child.num_leaves)]


def names_of(op, tree):
    """For each array the name of its residual, or of the argument of its tangent."""
    residuals, tangents = tree.children()
    every = zip(op.arguments, tangents.children(), strict=True)
    return (
        _names_of_residuals(residuals),
        [name for name, child in every if child.num_leaves],
    )


# 4. What `jax.vmap` makes of it.


def _batch(axis, arrays, places, *, call_jaxpr, levels, **params):
    op, arrays, places = params["op"], [*arrays], [*places]
    of_residuals, of_tangents = names_of(op, params["tree"])
    read = {term.residual for term in op.terms.values()}
    mapped = {
        n for n, p in zip(of_residuals, places, strict=False) if p is not None
    } & read
    for k, name in enumerate(of_residuals):
        if name in mapped and places[k] is None:  # A residual is mapped as a whole.
            arrays[k] = jnp.broadcast_to(arrays[k], (axis.size, *arrays[k].shape))
            places[k] = 0
    has = [name in op.leading for name in (*of_residuals, *of_tangents)]
    arrays, levels, place = batched(axis, arrays, places, has, levels)
    results = linear_map_p.bind(*arrays, levels=levels, **params)
    return results, [place] * len(results)


batching.fancy_primitive_batchers[linear_map_p] = _batch
