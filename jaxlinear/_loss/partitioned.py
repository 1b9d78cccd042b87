"""A walk over blocks under automatic partitioning: each device walks over its own.

XLA partitions a loop badly: it gathers the rows or the weight, and every device
computes everything, or sends the weight gradient in every block. `custom_partitioning`
waits until it is known how the arrays are split, and then takes what one device does.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxlinear._every_mode.open import OpenPrimitive
from jaxlinear._loss.block import Gradients, with_derivatives_in_float32
from jaxlinear._loss.layout import Layout, names_of


class Found(NamedTuple):
    """What a walk finds: a tree of arrays (*) of the rows, and gradients."""

    rows: Any
    gradients: Gradients


class Walk(NamedTuple):
    """``function(spec, options, X, W, B, rows)``, which returns a `Found`.

    ``rows`` is a tree of arrays (*). The walk has a hash, for JAX's caches.
    """

    function: Callable[..., Found]
    spec: Any
    options: Any

    def __call__(self, *arrays):
        def function(spec, *arrays):
            return self.function(spec, self.options, *arrays)

        return with_derivatives_in_float32(function, self.spec, *arrays)

    def over(self, axes):
        return self._replace(spec=self.spec._replace(axes=axes))


def partitioned(walk, X, W, B, rows):
    """``walk(X, W, B, rows)``, by every device of its own rows and classes."""
    arrays, tree = jax.tree.flatten((X, W, B, rows))
    is_manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if is_manual or walk.spec.axes:  # Inside `jax.shard_map` they are a device's.
        return walk(X, W, B, rows)
    return partitioned_p.tree(*arrays, walk=walk, tree=tree)


@partial(jax.jit, static_argnames=("walk", "tree"), inline=True)
def _partitioned(*arrays, walk, tree):
    def of_all(*arrays):
        return walk(*tree.unflatten(arrays))

    found = jax.eval_shape(of_all, *arrays)
    apply = custom_partitioning(of_all)
    apply.def_partition(
        partial(_partition, walk, tree),
        sharding_rule=_rule(tree.unflatten(arrays), found),
        need_replication_factors=("f",),
    )
    return apply(*arrays)


def _rule(arguments, found):
    """Which axes of the arguments and of what is found are split together."""
    X, W, B, rows = arguments
    leading = " ".join(f"r{k}" for k in range(X.ndim - 1))
    of_each = Gradients(X=f"{leading} f", W="c f", B="c")

    def text(given, rows):
        names = [name for a, name in zip(given, of_each, strict=True) if a is not None]
        return names, [leading] * len(jax.tree.leaves(rows))

    given, of_rows = text((X, W, B), rows)
    results, of_result_rows = text(found.gradients, found.rows)
    return f"{', '.join(given + of_rows)} -> {', '.join(of_result_rows + results)}"


def _partition(walk, tree, mesh, arguments, results):
    X, W, B, rows = tree.unflatten(arguments)
    if isinstance(X.sharding, NamedSharding):
        mesh, layout = X.sharding.mesh, Layout.of(_split(X), _split(W))
    else:
        # JAX knows no mesh if only `jax.set_mesh` names it: no argument of the program
        # is on several devices. Each of them computes all.
        mesh = Mesh([*X.sharding.device_set], "devices")
        layout = Layout.of([None] * len(X.shape), [None] * 2)
    of_each = Gradients(layout.of_h, layout.of_weight, layout.of_bias)

    def of_device(*arrays):
        X, W, B, rows = tree.unflatten(arrays)
        W, B = layout.gathered(W, B)
        found = walk.over(layout.split_classes)(X, W, B, rows)
        return found._replace(gradients=layout.summed(found.gradients))

    def shardings(given, rows):
        of_given = [
            None if a is None else s for a, s in zip(given, of_each, strict=True)
        ]
        of_rows = jax.tree.map(lambda _: layout.of_rows, rows)
        return jax.tree.map(partial(NamedSharding, mesh), (of_given, of_rows))

    given, of_rows = shardings((X, W, B), rows)
    gradients, of_result_rows = shardings(results.gradients, results.rows)
    return (
        mesh,
        of_device,
        Found(of_result_rows, Gradients(*gradients)),
        tuple(jax.tree.leaves((given, of_rows))),
    )


def _split(array):
    """What splits each axis of ``array``, if all parts have the same length."""
    spec = array.sharding.spec
    entries = [*spec, *[None] * (len(array.shape) - len(spec))]
    sizes = array.sharding.mesh.shape

    def parts(entry):
        return math.prod(sizes[name] for name in names_of(entry))

    lengths = zip(array.shape, entries, strict=True)
    return [None if length % parts(entry) else entry for length, entry in lengths]


partitioned_p = OpenPrimitive(
    "partitioned", _partitioned, lambda *, tree, **_: tree.num_leaves
)


def _jvp(primals, tangents, *, walk, tree, call_jaxpr):
    moving = {k: t for k, t in enumerate(tangents) if type(t) is not ad.Zero}

    def of_moving(some):
        arrays = [some.get(k, primal) for k, primal in enumerate(primals)]
        return jax.tree.leaves(walk(*tree.unflatten(arrays)))

    return jax.jvp(of_moving, ({k: primals[k] for k in moving},), (moving,))


ad.primitive_jvps[partitioned_p] = _jvp


def _batch(axis, arrays, places, *, walk, tree, call_jaxpr):
    if all(place is None for place in places):
        results = partitioned_p.bind(*arrays, walk=walk, tree=tree)
        return results, [None] * len(results)

    def of_one(arrays):
        return jax.tree.leaves(walk(*tree.unflatten(arrays)))

    mapped = jax.vmap(
        of_one, ([*places],), axis_size=axis.size, spmd_axis_name=axis.spmd_name
    )
    results = mapped([*arrays])
    return results, [0] * len(results)


batching.fancy_primitive_batchers[partitioned_p] = _batch
