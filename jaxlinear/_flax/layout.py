"""Flax's kernel (*in, *out) and our weight (*out, *in), of one layer.

A stack of layers, as ``nnx.vmap`` and ``nn.scan`` make, has leading axes before these,
which stay first. A kernel or a weight is an array, a ``jax.ShapeDtypeStruct``, or a
holder of one: an NNX variable or a box of Flax's, which also has names of the axes.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlinear._checks import ARRAYS
from jaxlinear._flax.checks import as_tuple


class AxisCounts(NamedTuple):
    """How many axes of a layer's kernel belong to the input and to the output."""

    inputs: int = 1
    outputs: int = 1


def axis_counts(in_features, out_features):
    return AxisCounts(len(as_tuple(in_features)), len(as_tuple(out_features)))


def kernel_to_weight(kernel, counts):
    """(..., *in, *out) to (..., *out, *in)."""
    return _swapped(kernel, *counts)


def weight_to_kernel(weight, counts):
    """(..., *out, *in) to (..., *in, *out)."""
    inputs, outputs = counts
    return _swapped(weight, outputs, inputs)


def weight_metadata(kernel_metadata, counts):
    """The metadata of a weight's variable, from a kernel's."""
    return _swapped_metadata(kernel_metadata, *counts)


def _swapped(holder, first, second):
    """``holder`` with its last axes, ``first`` and then ``second``, swapped."""
    value = held(holder)
    if isinstance(holder, nnx.Variable):
        swapped = holder.replace(_swapped(value, first, second))
        metadata = holder.get_metadata()
        swapped.set_metadata(**_swapped_metadata(metadata, first, second))
        return swapped
    if isinstance(holder, nnx.VariableMetadata):
        swapped = _swapped(value, first, second)
        metadata = _swapped_metadata(holder.metadata, first, second)
        return dataclasses.replace(holder, raw_value=swapped, metadata=metadata)
    if isinstance(holder, nn.Partitioned):
        names = _swapped_names(holder.names, first, second)
        return holder.replace(value=_swapped(value, first, second), names=names)
    if has_one_for_each_axis(value, first + second):
        vectors, tree = jax.tree.flatten(value)
        order = _order(len(vectors), first, second)
        return jax.tree.unflatten(tree, [vectors[axis] for axis in order])
    # In the place of an array, an optimizer's state may have nothing, or a pair.
    return jax.tree.map(lambda leaf: _transposed(leaf, first, second), value)


def held(holder):
    """What a variable or a box holds; anything else as it is."""
    if isinstance(holder, nnx.Variable):
        return holder.get_value()
    if isinstance(holder, nnx.VariableMetadata):
        return holder.raw_value
    return holder.value if isinstance(holder, nn.Partitioned) else holder


def has_one_for_each_axis(value, axes):
    """Whether it is a list of vectors, one for each axis: what SM3 keeps of an array.

    Flax turns a list into a mapping from its indices when it updates it.
    """
    vectors = jax.tree.leaves(value)
    is_list = isinstance(value, (list, Mapping)) and len(vectors) >= axes
    return is_list and all(len(np.shape(vector)) == 1 for vector in vectors)


def _transposed(leaf, first, second):
    if not isinstance(leaf, ARRAYS) or leaf.ndim < first + second:
        return leaf
    order = _order(leaf.ndim, first, second)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            sharding = _swapped_names(sharding, first, second, leaf.ndim)
        shape = tuple(leaf.shape[axis] for axis in order)
        return leaf.update(shape=shape, sharding=sharding)
    return leaf.transpose(order)


def _order(ndim, first, second):
    stacked = ndim - first - second
    axes = range(stacked, ndim)
    return (*range(stacked), *axes[first:], *axes[:first])


# Names of axes, in metadata and in shardings.

# Flax's name of the sharding, its earlier names, and the sharding of what an optimizer
# keeps of the parameter.
_NAMES_OF_AXES = "out_sharding", "sharding", "sharding_names", "optimizer_sharding"


def _swapped_metadata(metadata, first, second):
    swapped = {
        name: _swapped_names(metadata[name], first, second)
        for name in _NAMES_OF_AXES
        if metadata.get(name)
    }
    return {**metadata, **swapped}


def _swapped_names(spec, first, second, ndim=0):
    """Names in the order of the swapped axes.

    A spec with fewer names than ``ndim`` names the first axes of the array. Without
    ``ndim`` it names the axes that are swapped.
    """
    if isinstance(spec, NamedSharding):
        return spec.update(spec=_swapped_names(spec.spec, first, second, ndim))
    if isinstance(spec, PartitionSpec):
        names = _swapped_names(spec.partitions, first, second, ndim)
        return PartitionSpec(*names, unreduced=spec.unreduced, reduced=spec.reduced)
    count = max(len(spec), ndim, first + second)
    names = (*spec, *[None] * count)[:count]
    return tuple(names[axis] for axis in _order(count, first, second))
