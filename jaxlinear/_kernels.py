"""Flax's kernel (*in, *out) and the weight (*out, *in): values, names, whole trees.

A stack of layers, as ``nnx.vmap`` and ``nn.scan`` make, has leading axes before these,
which stay where they are.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import jax
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._arguments import (
    ARRAYS,
    as_tuple,
    check_layers_found,
    check_unfactored,
    checked_layers,
)

Tree = TypeVar("Tree")


class Axes(NamedTuple):
    """How many axes of a layer's kernel are those of the input, and of the output."""

    inputs: int = 1
    outputs: int = 1


def axes_of(in_features, out_features):
    """The :class:`Axes` of a layer with these numbers of features."""
    return Axes(len(as_tuple(in_features)), len(as_tuple(out_features)))


Layers = Mapping[str, tuple[int, int]] | Iterable[str]
"""Layers by their dotted paths, with their :class:`Axes` where those are not (1, 1)."""


def convert_tree(tree: Tree, layers: Layers) -> Tree:
    """``tree`` with the weights of our layers in the place of Flax's kernels.

    The tree is one that belongs to a model and not the model itself: Linen variables,
    an ``nnx.State``, what Orbax restored or is to restore, an optimizer's state, which
    has such trees inside. It is not changed. For each layer the entry ``kernel``
    (..., *in, *out) becomes ``weight`` (..., *out, *in), with the names of its axes;
    everything else stays. The values are equal to the bit.

    Args:
      tree: a tree whose mappings have the names of the model's attributes. Its leaves
        are arrays, ``jax.ShapeDtypeStruct``, NNX variables or Linen's boxes.
      layers: the dotted paths of the layers, as ``"decoder.layers.0.mlp.up"`` (``""``
        is the tree itself), with or without Linen's ``params``; for layers with several
        input or output axes a mapping from paths to how many they have, (1, 2) for the
        query of an attention. ``Report.converted`` is one.

    Returns:
      A tree of the same kind.

    Raises:
      ValueError: if a layer is nowhere in the tree, or what stands there has fewer axes
        than its kernel, so that they cannot be told apart.
      TypeError: if ``layers`` is a string, or has other values.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import convert_tree
      >>> flax = {"params": {"up": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
      >>> jax.tree.map(jnp.shape, convert_tree(flax, ["up"]))
      {'params': {'up': {'bias': (2,), 'weight': (2, 3)}}}
    """
    converted, missing = with_weights(tree, layers)
    check_layers_found("kernel", missing)
    return converted


def revert_tree(tree: Tree, layers: Layers) -> Tree:
    """The inverse of :func:`convert_tree`: Flax's kernels in the place of our weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import revert_tree
      >>> jax.tree.map(jnp.shape, revert_tree({"weight": jnp.ones((2, 3))}, [""]))
      {'kernel': (3, 2)}
    """
    reverted, missing = with_kernels(tree, layers)
    check_layers_found("weight", missing)
    return reverted


def with_weights(tree, layers):
    """:func:`convert_tree`, and the layers that are not in the tree."""
    return _renamed(tree, layers, "kernel", "weight", weight_of)


def with_kernels(tree, layers):
    """:func:`revert_tree`, and the layers that are not in the tree."""
    return _renamed(tree, layers, "weight", "kernel", kernel_of)


def _renamed(tree, layers, old, new, change):
    axes = checked_layers(layers, Axes)
    layer_of = {tuple(path.split(".")) if path else (): path for path in axes}

    def is_parameters(node):
        # A module of that name has a mapping there.
        return isinstance(node, Mapping) and not isinstance(node.get(old, {}), Mapping)

    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_parameters)
    layer_at = _layers_at([p for p, node in nodes if is_parameters(node)], layer_of)

    def renamed(path, node):
        if path not in layer_at:
            return node
        layer = layer_at[path]
        for leaf in jax.tree.leaves(node[old]):
            check_unfactored(f"{layer}.{old}", leaf, sum(axes[layer]))
        moved = {new: change(node[old], axes[layer])}
        left = {name: entry for name, entry in node.items() if name != old}
        return type(node)({**left, **moved})

    new_tree = jax.tree.map_with_path(renamed, tree, is_leaf=is_parameters)
    return new_tree, axes.keys() - layer_at.values()


def _names(path):
    """The entries of a path as strings, whatever kinds of nodes they go through."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _layers_at(paths, layer_of):
    """The layer at each path that leads to one.

    An optimizer's state has trees of parameters inside, so a layer's path is the end of
    one in the tree. What stands before it is where such a tree begins, and inside of it
    no other one begins: ``other.up`` is not the layer ``up``.
    """
    found = {}
    for path in paths:
        names = _names(path)
        for start in range(len(names) + 1):
            if names[start:] in layer_of:
                found[path] = names[:start], layer_of[names[start:]]
                break
    roots = {root for root, _ in found.values()}
    return {
        path: layer
        for path, (root, layer) in found.items()
        if not any(root[:length] in roots for length in range(len(root)))
    }


# One kernel or weight, in what holds it: an array, a `jax.ShapeDtypeStruct`, an NNX
# variable, or one of Flax's boxes, whose names of the axes are moved with the axes.


def weight_of(kernel, axes):
    """The weight (..., *out, *in) of a kernel (..., *in, *out)."""
    return _moved(kernel, *axes)


def kernel_of(weight, axes):
    """The inverse of :func:`weight_of`."""
    inputs, outputs = axes
    return _moved(weight, outputs, inputs)


def _moved(holder, first, second):
    """The last axes of what is held, ``first`` and then ``second``, swapped."""
    if isinstance(holder, nnx.Variable):
        moved = holder.replace(_moved(holder.get_value(), first, second))
        metadata = holder.get_metadata()
        moved.set_metadata(**_moved_metadata(metadata, first, second, holder.ndim))
        return moved
    if isinstance(holder, nnx.VariableMetadata):
        value = _moved(holder.raw_value, first, second)
        metadata = _moved_metadata(holder.metadata, first, second, value.ndim)
        return dataclasses.replace(holder, raw_value=value, metadata=metadata)
    if isinstance(holder, nn.Partitioned):
        value = _moved(holder.value, first, second)
        names = _moved_names(holder.names, first, second, value.ndim)
        return holder.replace(value=value, names=names)
    # An optimizer has other things, too, in the place of an array that it does not use.
    if not isinstance(holder, ARRAYS) or holder.ndim < first + second:
        return holder
    order = _order(holder.ndim, first, second)
    if isinstance(holder, jax.ShapeDtypeStruct):
        sharding = holder.sharding
        if isinstance(sharding, NamedSharding):
            sharding = _moved_names(sharding, first, second, holder.ndim)
        shape = tuple(holder.shape[axis] for axis in order)
        return holder.update(shape=shape, sharding=sharding)
    return holder.transpose(order)


def _order(ndim, first, second):
    stacked = ndim - first - second
    axes = range(stacked, ndim)
    return (*range(stacked), *axes[first:], *axes[:first])


# Names of axes, as metadata and shardings have them.


def weight_metadata(kernel_metadata, axes):
    """The metadata of a weight's variable, of that of a kernel's."""
    inputs, outputs = axes
    return _moved_metadata(kernel_metadata, inputs, outputs, inputs + outputs)


def _moved_metadata(metadata, first, second, ndim):
    # Flax's name of the sharding, those that it had before, and that of the state
    # which an optimizer keeps of the parameter.
    names = {"out_sharding", "sharding", "sharding_names", "optimizer_sharding"}
    moved = {
        name: metadata[name] and _moved_names(metadata[name], first, second, ndim)
        for name in names & metadata.keys()
    }
    return {**metadata, **moved}


def _moved_names(spec, first, second, ndim):
    """Names in the order of the moved axes. Too few are those of the axes that move."""
    if isinstance(spec, NamedSharding):
        return spec.update(spec=_moved_names(spec.spec, first, second, ndim))
    if isinstance(spec, PartitionSpec):
        left = {"unreduced": spec.unreduced, "reduced": spec.reduced}
        names = _moved_names(spec.partitions, first, second, ndim)
        return PartitionSpec(*names, **left)
    count = ndim if len(spec) == ndim else first + second
    names = (*spec, *[None] * count)[:count]
    return tuple(names[axis] for axis in _order(count, first, second))
