"""Trees of a whole model: every layer's kernel becomes a weight, and back."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import keystr

from jaxlinear._flax.layout import (
    AxisCounts,
    has_one_for_each_axis,
    held,
    kernel_to_weight,
    weight_to_kernel,
)

Tree = TypeVar("Tree")

Layers = Mapping[str, tuple[int, int]] | Iterable[str]
"""Layers by their dotted paths, with an :class:`AxisCounts` unless all are (1, 1)."""


def convert_tree(tree: Tree, layers: Layers) -> Tree:
    """A copy of ``tree`` with our weights instead of Flax's kernels.

    ``tree`` is not the model itself but belongs to it: Linen variables, an
    ``nnx.State``, a checkpoint that Orbax restored, the target of a restore, or an
    optimizer's state, which has such trees inside. For each layer the entry ``kernel``
    (..., *in, *out) becomes ``weight`` (..., *out, *in), with the names of its axes.
    Everything else stays, and values are equal to the bit.

    Args:
      tree: a tree whose mappings have the names of the model's attributes. Its leaves
        are arrays, ``jax.ShapeDtypeStruct``, NNX variables or Linen's boxes.
      layers: the dotted paths of the layers, as ``"decoder.layers.0.mlp.up"`` (``""``
        is the tree itself), with or without Linen's ``params``; for layers with several
        input or output axes a mapping from paths to both numbers, (1, 2) for the query
        of an attention. ``Report.converted`` is such a mapping.

    Returns:
      A tree of the same kind.

    Raises:
      ValueError: if a layer is nowhere in the tree, or an array in the place of its
        kernel has fewer axes than the kernel.
      TypeError: if ``layers`` is a string, or has other values.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import convert_tree
      >>> flax = {"params": {"up": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
      >>> jax.tree.map(jnp.shape, convert_tree(flax, ["up"]))
      {'params': {'up': {'bias': (2,), 'weight': (2, 3)}}}
    """
    converted, missing = with_weights(tree, layers)
    _check_layers_are_there("kernel", missing)
    return converted


def revert_tree(tree: Tree, layers: Layers) -> Tree:
    """The inverse of :func:`convert_tree`: Flax's kernels instead of our weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlinear.linen import revert_tree
      >>> jax.tree.map(jnp.shape, revert_tree({"weight": jnp.ones((2, 3))}, [""]))
      {'kernel': (3, 2)}
    """
    reverted, missing = with_kernels(tree, layers)
    _check_layers_are_there("weight", missing)
    return reverted


def dimension_numbers(layers: Layers, kind: Callable[..., Any]) -> Callable[[Any], Any]:
    """Which axes of each kernel or weight belong to the input, and which to the output.

    Optimizers that read a parameter as a matrix must be told, since they know neither
    our weight (out, in) nor the axes of a stack or of heads. Pass the result as
    ``muon_weight_dimension_numbers`` of ``optax.contrib.muon`` or
    ``weight_dimension_numbers`` of ``optax.contrib.galore``. It is right before a
    conversion and after it.

    Args:
      layers: the layers as :func:`convert_tree` takes them; those of an NNX model are
        ``jaxlinear.nnx.layers_of(model)``.
      kind: ``optax.contrib.MuonDimensionNumbers`` or ``GaLoreDimensionNumbers``.

    Returns:
      A function of a tree of parameters. It returns the tree with
      ``kind(reduction_axis=..., output_axis=...)`` for the ``kernel``
      (..., *in, *out) or the ``weight`` (..., *out, *in) of each layer, and None for
      everything else.

    Raises:
      TypeError: as in :func:`convert_tree`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxlinear.nnx import dimension_numbers
      >>> numbers = dimension_numbers(["up"], optax.contrib.MuonDimensionNumbers)
      >>> numbers({"up": {"weight": jnp.ones((2, 3))}})["up"]["weight"]
      MuonDimensionNumbers(reduction_axis=(-1,), output_axis=(-2,))
    """
    counts = _checked_layers(layers)
    is_layer = functools.partial(_has_one_of, ("kernel", "weight"))

    def entry_numbers(name, layer):
        inputs, outputs = counts[layer]
        ends = range(-inputs - outputs, 0)
        if name == "kernel":
            return kind(reduction_axis=(*ends[:inputs],), output_axis=(*ends[inputs:],))
        if name == "weight":
            return kind(
                reduction_axis=(*ends[outputs:],), output_axis=(*ends[:outputs],)
            )
        return None

    def numbers(parameters):
        layer_at = _layers_in(parameters, counts, is_layer)

        def node_numbers(path, node):
            if path not in layer_at:
                return jax.tree.map(lambda _: None, node)
            entries = {}
            for name, entry in node.items():
                new = entry_numbers(name, layer_at[path])
                entries[name] = jax.tree.map(lambda _, new=new: new, entry)
            return type(node)(entries)

        return jax.tree.map_with_path(node_numbers, parameters, is_leaf=is_layer)

    return numbers


def with_weights(tree, layers, argument="tree"):
    """:func:`convert_tree`, and the layers that are not in the tree."""
    return _converted(tree, layers, "kernel", "weight", kernel_to_weight, argument)


def with_kernels(tree, layers, argument="tree"):
    """:func:`revert_tree`, and the layers that are not in the tree."""
    return _converted(tree, layers, "weight", "kernel", weight_to_kernel, argument)


def _converted(tree, layers, old, new, swap, argument):
    counts = _checked_layers(layers)
    is_layer = functools.partial(_has_one_of, (old,))
    layer_at = _layers_in(tree, counts, is_layer)

    def converted(path, node):
        if path not in layer_at:
            return node
        layer = layer_at[path]
        others = {name: entry for name, entry in node.items() if name != old}
        where = repr(f"{layer}.{old}") + part_of_state(tree, path)
        _check_axes(argument, where, node[old], sum(counts[layer]))
        return type(node)({**others, new: swap(node[old], counts[layer])})

    new_tree = jax.tree.map_with_path(converted, tree, is_leaf=is_layer)
    return new_tree, counts.keys() - layer_at.values()


def part_of_state(tree, path):
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


def dotted(path):
    """A path in a tree, or in an NNX model, as users write it."""
    return keystr(path, simple=True, separator=".")


# The layers in a tree.


def _names(path):
    """The entries of a path as strings, whatever kinds of nodes it goes through."""
    return tuple(dotted((entry,)) for entry in path)


def _has_one_of(names, node):
    """Whether it is a mapping with one of these parameters."""
    # A module of that name is a mapping.
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

    An optimizer's state has trees of parameters inside, so a path in it ends with the
    layer's path and begins with that of such a tree, its root. No other tree of
    parameters begins inside one: ``other.up`` is not the layer ``up``.
    """
    rooted = {}
    for path in paths:
        names = _names(path)
        for start in range(len(names) + 1):
            if names[start:] in layer_of:
                rooted[path] = names[:start], layer_of[names[start:]]
                break
    roots = {root for root, _ in rooted.values()}
    return {
        path: layer
        for path, (root, layer) in rooted.items()
        if not any(root[:length] in roots for length in range(len(root)))
    }


def _checked_layers(layers: Any) -> dict[str, AxisCounts]:
    """``layers`` as a dict."""
    if isinstance(layers, str):
        raise TypeError(
            f"`layers` must be paths of layers, got one string: pass [{layers!r}]"
        )
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(layers, AxisCounts())
    checked = {}
    for path, counts in layers.items():
        if not isinstance(path, str):
            raise TypeError(
                f"`layers` must have dotted paths, such as 'mlp.up', got {path!r}"
            )
        try:
            inputs, outputs = map(operator.index, counts)
        except (TypeError, ValueError):
            raise TypeError(
                f"`layers` must say how many input and output axes {path!r} has, such"
                f" as (1, 1), got {counts!r}"
            ) from None
        checked[path] = AxisCounts(inputs, outputs)
    return checked


def _check_layers_are_there(entry, missing):
    if missing:
        names = ", ".join(map(repr, sorted(missing)))
        required = f"`layers` must have an entry {entry!r} in `tree`"
        raise ValueError(f"{required}, where there is none for {names}")


def _check_axes(argument, where, entry, axes):
    """Refuse what an optimizer keeps by other axes than the parameter's.

    It does not say which axes these are.
    """
    if has_one_for_each_axis(held(entry), axes):
        return
    for leaf in jax.tree.leaves(entry):
        shape = np.shape(leaf)
        # GaLore's may look like a matrix of the layer.
        is_projector = where.endswith(".projector")
        if math.prod(shape) > 1 and (len(shape) < axes or is_projector):
            kind = "none of a projection" if is_projector else f"{axes} axes or more"
            raise ValueError(
                f"`{argument}` must have {kind} at {where}, got shape {shape}: start"
                " this state anew (a factored optimizer's does not say which axes it"
                " belongs to)"
            )
