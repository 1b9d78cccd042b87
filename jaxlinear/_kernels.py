"""Flax's kernel (*in, *out) and the weight (*out, *in): values, names, whole trees.

A stack of layers, as ``nnx.vmap`` and ``nn.scan`` make, has leading axes before these,
which stay where they are.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
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


def dimension_numbers(layers: Layers, kind: Callable[..., Any]) -> Callable[[Any], Any]:
    """Which axes of each kernel or weight belong to the input, and which to the output.

    Optimizers that take a parameter as a matrix ask for it, since they know neither our
    weight (out, in) nor the axes of a stack or of heads: ``optax.contrib.muon`` as
    ``muon_weight_dimension_numbers``, ``optax.contrib.galore`` as
    ``weight_dimension_numbers``. The answer is right before a conversion and after it.

    Args:
      layers: the layers as :func:`convert_tree` takes them; those of an NNX model are
        ``jaxlinear.nnx.layers_of(model)``.
      kind: ``optax.contrib.MuonDimensionNumbers`` or ``GaLoreDimensionNumbers``.

    Returns:
      A function of a tree of parameters. It returns a tree with
      ``kind(reduction_axis=..., output_axis=...)`` in the place of the ``kernel``
      (..., *in, *out) or the ``weight`` (..., *out, *in) of each layer, and None in the
      place of everything else.

    Raises:
      TypeError: as in :func:`convert_tree`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxlinear.nnx import dimension_numbers
      >>> numbers = dimension_numbers(["up"], optax.contrib.MuonDimensionNumbers)
      >>> numbers({"up": {"weight": jnp.ones((2, 3))}})["up"]["weight"]
      MuonDimensionNumbers(reduction_axis=(-1,), output_axis=(-2,))
    """
    axes = checked_layers(layers, Axes)

    def of_each(parameters):
        is_layer = functools.partial(_has_one_of, ("kernel", "weight"))
        layer_at = _layers_in(parameters, axes, is_layer)

        def of(path, node):
            if path not in layer_at:
                return jax.tree.map(lambda _: None, node)
            inputs, outputs = axes[layer_at[path]]
            last = {"kernel": outputs, "weight": inputs}

            def of_entry(name):
                if name not in last:
                    return None
                split = -last[name]
                first = (*range(-inputs - outputs, split),)
                both = first, (*range(split, 0),)
                reduction, output = both if name == "kernel" else reversed(both)
                return kind(reduction_axis=reduction, output_axis=output)

            return type(node)(
                {
                    name: jax.tree.map(lambda _, name=name: of_entry(name), entry)
                    for name, entry in node.items()
                }
            )

        return jax.tree.map_with_path(of, parameters, is_leaf=is_layer)

    return of_each


def with_weights(tree, layers, argument="tree"):
    """:func:`convert_tree`, and the layers that are not in the tree."""
    return _renamed(tree, layers, "kernel", "weight", weight_of, argument)


def with_kernels(tree, layers, argument="tree"):
    """:func:`revert_tree`, and the layers that are not in the tree."""
    return _renamed(tree, layers, "weight", "kernel", kernel_of, argument)


def _renamed(tree, layers, old, new, change, argument):
    axes = checked_layers(layers, Axes)
    is_layer = functools.partial(_has_one_of, (old,))
    layer_at = _layers_in(tree, axes, is_layer)

    def renamed(path, node):
        if path not in layer_at:
            return node
        layer, kept = layer_at[path], node[old]
        if not _has_one_for_each_axis(_held(kept), sum(axes[layer])):
            where = repr(f"{layer}.{old}") + in_state(tree, path)
            for leaf in jax.tree.leaves(kept):
                check_unfactored(argument, where, leaf, sum(axes[layer]))
        moved = {new: change(kept, axes[layer])}
        left = {name: entry for name, entry in node.items() if name != old}
        return type(node)({**left, **moved})

    new_tree = jax.tree.map_with_path(renamed, tree, is_leaf=is_layer)
    return new_tree, axes.keys() - layer_at.values()


def in_state(tree, path):
    """The part of an optimizer's state on a path, " in MuonState.mu", or nothing."""
    part = ""
    for entry in path:
        if isinstance(entry, jax.tree_util.GetAttrKey):
            part = f" in {type(tree).__name__}.{entry.name}"
            tree = getattr(tree, entry.name)
        elif isinstance(entry, jax.tree_util.SequenceKey):
            tree = tree[entry.idx]
        elif isinstance(entry, jax.tree_util.DictKey):
            tree = tree[entry.key]
        else:
            break
    return part


def _names(path):
    """The entries of a path as strings, whatever kinds of nodes they go through."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _has_one_of(names, node):
    """Whether it is a mapping with one of these parameters."""
    # A module of that name has a mapping there.
    return isinstance(node, Mapping) and any(
        not isinstance(node.get(name, {}), Mapping) for name in names
    )


def _layers_in(tree, layers, is_layer):
    """The layer at each path of the tree that leads to one."""
    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_layer)
    layer_of = {tuple(path.split(".")) if path else (): path for path in layers}
    return _layers_at([path for path, node in nodes if is_layer(node)], layer_of)


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


def _held(holder):
    """What a variable or a box holds, or what is in neither."""
    if isinstance(holder, nnx.Variable):
        return holder.get_value()
    if isinstance(holder, nnx.VariableMetadata):
        return holder.raw_value
    return holder.value if isinstance(holder, nn.Partitioned) else holder


def _moved(holder, first, second):
    """The last axes of what is held, ``first`` and then ``second``, swapped."""
    held = _held(holder)
    if isinstance(holder, nnx.Variable):
        moved = holder.replace(_moved(held, first, second))
        metadata = holder.get_metadata()
        moved.set_metadata(**_moved_metadata(metadata, first, second))
        return moved
    if isinstance(holder, nnx.VariableMetadata):
        value = _moved(held, first, second)
        metadata = _moved_metadata(holder.metadata, first, second)
        return dataclasses.replace(holder, raw_value=value, metadata=metadata)
    if isinstance(holder, nn.Partitioned):
        value = _moved(held, first, second)
        return holder.replace(
            value=value, names=_moved_names(holder.names, first, second)
        )
    if _has_one_for_each_axis(held, first + second):
        vectors, tree = jax.tree.flatten(held)
        order = _order(len(vectors), first, second)
        return jax.tree.unflatten(tree, [vectors[axis] for axis in order])
    # An optimizer has nothing in the place of an array that it does not use, or a pair.
    return jax.tree.map(lambda leaf: _transposed(leaf, first, second), held)


def _has_one_for_each_axis(held, axes):
    """Whether it is a list of vectors, one for each axis: what SM3 keeps of an array.

    Flax makes of a list, once it is updated, a mapping from its indices.
    """
    vectors = jax.tree.leaves(held)
    is_list = isinstance(held, (list, Mapping)) and len(vectors) >= axes
    return is_list and all(len(np.shape(vector)) == 1 for vector in vectors)


def _transposed(leaf, first, second):
    if not isinstance(leaf, ARRAYS) or leaf.ndim < first + second:
        return leaf
    order = _order(leaf.ndim, first, second)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            sharding = _moved_names(sharding, first, second, leaf.ndim)
        shape = tuple(leaf.shape[axis] for axis in order)
        return leaf.update(shape=shape, sharding=sharding)
    return leaf.transpose(order)


def _order(ndim, first, second):
    stacked = ndim - first - second
    axes = range(stacked, ndim)
    return (*range(stacked), *axes[first:], *axes[:first])


# Names of axes, as metadata and shardings have them.


def weight_metadata(kernel_metadata, axes):
    """The metadata of a weight's variable, of that of a kernel's."""
    inputs, outputs = axes
    return _moved_metadata(kernel_metadata, inputs, outputs)


def _moved_metadata(metadata, first, second):
    # Flax's name of the sharding, those that it had before, and that of the state
    # which an optimizer keeps of the parameter.
    names = {"out_sharding", "sharding", "sharding_names", "optimizer_sharding"}
    moved = {
        name: metadata[name] and _moved_names(metadata[name], first, second)
        for name in names & metadata.keys()
    }
    return {**metadata, **moved}


def _moved_names(spec, first, second, ndim=0):
    """Names in the order of the moved axes.

    Too few are those of the axes that move, or of the first of ``ndim`` axes.
    """
    if isinstance(spec, NamedSharding):
        return spec.update(spec=_moved_names(spec.spec, first, second, ndim))
    if isinstance(spec, PartitionSpec):
        left = {"unreduced": spec.unreduced, "reduced": spec.reduced}
        names = _moved_names(spec.partitions, first, second, ndim)
        return PartitionSpec(*names, **left)
    count = max(len(spec), ndim, first + second)
    names = (*spec, *[None] * count)[:count]
    return tuple(names[axis] for axis in _order(count, first, second))
