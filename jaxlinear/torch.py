"""PyTorch's checkpoints: parameters by the names that PyTorch has, both ways.

Our parameters have PyTorch's names and layout, so nothing is transposed and no bit
changes. Neither PyTorch nor Flax is imported before it is needed.
"""

import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._arguments import ARRAYS
from jaxlinear._state_dicts import tensors_of, write

Rename = Callable[[str], str] | Mapping[str, str]
"""What a parameter is called in PyTorch, of what it is called here."""


class LeftOut(NamedTuple):
    """What :func:`load` found no place for, or no value.

    Attributes:
      missing: parameters that the source has no tensor for, by the names looked for.
      unexpected: tensors of the source that are no parameter's.
      wrong_shape: parameters whose tensor has another shape, and both shapes.
      wrong_dtype: parameters whose tensor has another dtype, and both dtypes.
      untied: second names of tied parameters whose tensor has other values than that
        of the first, and the first.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: dict[str, str] = {}  # noqa: RUF012 (of a NamedTuple, never changed)
    wrong_dtype: dict[str, str] = {}  # noqa: RUF012
    untied: dict[str, str] = {}  # noqa: RUF012

    def __str__(self) -> str:
        parts = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "wrong shape": [f"{name}: {why}" for name, why in self.wrong_shape.items()],
            "wrong dtype": [f"{name}: {why}" for name, why in self.wrong_dtype.items()],
            "untied": [f"{name}: {why}" for name, why in self.untied.items()],
        }
        lines = []
        for title, entries in parts.items():
            lines += [f"{title} ({len(entries)}):"] if entries else []
            lines += [f"  {entry}" for entry in entries]
        return "\n".join(lines)


def load(
    target: Any,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    rename: Rename | None = None,
    prefix: str = "",
) -> Any:
    """Fill a layer or a model with the parameters of a PyTorch checkpoint.

    A parameter is called by its path, as PyTorch calls it:
    ``encoder.layers.0.linear1.weight``. It takes the tensor of that name bit for bit;
    it keeps its sharding, and each device reads its own shard of the file alone. What
    is filled are the ``nnx.Param`` and ``nnx.BatchStat`` of an NNX model, or the arrays
    of a tree of Linen variables, whose names leave out ``params`` and the other
    collections.

    - A tied parameter has several names, of which the source must have one; the others
      must have the same values.
    - A parameter of stacked layers, as ``nnx.vmap`` and ``nn.scan`` make, with the
      shape (L, out, in), takes L tensors: ``layers.weight`` is ``layers.0.weight`` and
      so on where the source has those, or wherever ``rename`` puts a ``{}``.
    - The weight (*out, *in) of a layer with several axes takes PyTorch's matrix.

    Args:
      target: an NNX module, which is filled in place, or a tree of arrays, such as
        Linen's variables, of which a new one is returned. Its leaves may be
        ``jax.ShapeDtypeStruct``, as ``nnx.eval_shape`` and ``jax.eval_shape`` make, so
        that there is one copy in memory.
      source: a state dict (of PyTorch tensors, or other arrays), or the path of a file:
        ``.safetensors``, ``.safetensors.index.json`` with files beside it, or ``.pt``,
        ``.pth`` and ``.bin``, which PyTorch reads with ``weights_only=True``.
      strict: whether to refuse a source that does not fit in all of its tensors.
      rename: the name in the source of a parameter here, as a function, or as a mapping
        from the path of a parameter or module to another, ``""`` for none:
        ``{"norm.scale": "norm.weight", "blocks": "transformer.h.{}"}``.
      prefix: what stands before these names. Other tensors of the source are not
        looked at.

    Returns:
      For a module, a :class:`LeftOut`, which is empty if ``strict``. For a tree, the
      new tree, and if not ``strict`` a tuple of it and a :class:`LeftOut`.

    Raises:
      ValueError: if the source does not fit, with all that is missing, unexpected or of
        another shape or dtype; or if a file is not whole. Nothing is changed then.
      TypeError: if the target is neither a module nor a tree of arrays, or the source
        neither a path nor a state dict.
      OSError: if a file cannot be read.

    Example:
      >>> import jax.numpy as jnp, jaxlinear.torch
      >>> variables = {"params": {"up": {"weight": jnp.zeros((2, 3))}}}
      >>> state = {"model.up.weight": jnp.ones((2, 3))}
      >>> jaxlinear.torch.load(variables, state, prefix="model.")
      {'params': {'up': {'weight': Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)}}}
    """
    parameters = _parameters(target, "target")
    tensors = {n: t for n, t in tensors_of(source).items() if n.startswith(prefix)}
    parts, left_out = _matched(parameters, tensors, rename, prefix)
    if strict and any(left_out):
        raise ValueError(
            f"`source` must fit `target`, of which nothing was changed:\n{left_out}"
        )
    # All are read before the first is put into its place.
    values = {i: _filled(parameters[i], part) for i, part in parts.items()}
    if not _is_module(target):
        leaves, structure = jax.tree.flatten(target)
        for i, value in values.items():
            leaves[parameters[i].place] = value
        tree = jax.tree.unflatten(structure, leaves)
        return tree if strict else (tree, left_out)
    for i, value in values.items():
        parameters[i].place.set_value(value)
    return left_out


def save(
    source: Any, path: str | os.PathLike[str], *, rename: Rename | None = None
) -> None:
    """Write the parameters of a layer or a model to a file that PyTorch can load.

    The names are those of :func:`load`. A tied parameter is written under each of its
    names, a weight of several axes as a matrix; stacked layers as they are, or as one
    tensor for each layer where ``rename`` puts a ``{}``.

    The file is replaced as a whole: it is written beside the old one, brought to the
    disk, and renamed. A process that is killed leaves the old file or the new one.

    Args:
      source: an NNX module, or a tree of arrays, such as Linen's variables.
      path: a file, whose end says of what kind it is, as in :func:`load`.
        ``.safetensors.index.json`` writes files of at most 5 GB beside it, with new
        names, and removes those of the index that it replaces.
      rename: as in :func:`load`.

    Raises:
      ValueError: if two parameters have the same name, one has no value here (it is a
        ``jax.ShapeDtypeStruct``, or partly on devices of other processes), or the file
        cannot have its dtype.
      TypeError: if the source is neither a module nor a tree of arrays.
      OSError: if the file cannot be written.

    Example:
      >>> import jax.numpy as jnp, jaxlinear.torch, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> jaxlinear.torch.save({"weight": jnp.ones((2, 3))}, path)
      >>> jaxlinear.torch.load({"weight": jnp.zeros((2, 3))}, path)
      {'weight': Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)}
    """
    arrays = {}
    for parameter in _parameters(source, "source"):
        value = parameter.value
        if isinstance(value, jax.ShapeDtypeStruct) or (
            isinstance(value, jax.Array) and not value.is_fully_addressable
        ):
            raise ValueError(
                f"`source` must have its values in this process, got"
                f" {parameter.names[0]!r}, a {type(value).__name__}"
            )
        for name in (_renamed(rename, name) for name in parameter.names):
            for full, index in _pieces(name, value.shape).items():
                if full in arrays:
                    raise ValueError(f"`rename` must not give {full!r} twice")
                shape = parameter.file_shape[len(index) :]
                is_whole = shape == value.shape
                arrays[full] = (
                    value if is_whole else np.asarray(value)[index].reshape(shape)
                )
    write(Path(path), arrays)


# The parameters, and what they are called.


class _Parameter(NamedTuple):
    """A parameter by all its names, where it is put, and its shape in PyTorch."""

    names: tuple[str, ...]
    value: Any
    place: Any
    file_shape: tuple[int, ...]


def _is_module(target):
    # A tree of Flax's is a mapping, and so are some modules: Flax says which.
    flax = sys.modules.get("flax")  # Without it nothing is a module of Flax.
    return flax is not None and isinstance(target, flax.nnx.Module)


def _parameters(tree, argument):
    found = _of_module(tree) if _is_module(tree) else _of_tree(tree, argument)
    names = Counter(name for parameter in found for name in parameter.names)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"`{argument}` must have one parameter for a name, got {twice}"
        )
    return found


def _of_module(module):
    from flax import nnx

    import jaxlinear.nnx
    from jaxlinear._kernels import axes_of

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    names, variables, out_axes = {}, {}, {}
    for path, node in jax.tree.leaves_with_path(module, is_leaf=is_variable):
        if isinstance(node, (nnx.Param, nnx.BatchStat)):
            variables[id(node)] = node
            names.setdefault(id(node), []).append(_dotted(path))
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, jaxlinear.nnx.Linear):
            ins, outs = axes_of(layer.in_features, layer.out_features)
            out_axes[id(layer.weight)] = outs, ins
            out_axes[id(layer.bias)] = (outs,)
    return [
        _Parameter(
            tuple(names[key]),
            variable.get_value(),
            variable,
            _merged(variable.shape, out_axes.get(key, ())),
        )
        for key, variable in variables.items()
    ]


def _merged(shape, counts):
    """A shape with its last axes in groups of these numbers, each as one axis."""
    groups, end = [], len(shape)
    for count in reversed(counts):
        groups.insert(0, math.prod(shape[end - count : end]))
        end -= count
    return (*shape[:end], *groups)


def _of_tree(tree, argument):
    has_collections = isinstance(tree, Mapping) and "params" in tree
    found = []
    for place, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if isinstance(leaf, ARRAYS):
            # Neither a collection is a part of the name, nor a box around the array.
            path = path[1:] if has_collections else path
            if path and path[-1] == jax.tree_util.GetAttrKey("value"):
                path = path[:-1]
            found.append(_Parameter((_dotted(path),), leaf, place, tuple(leaf.shape)))
    if not found and jax.tree.leaves(tree):
        raise TypeError(
            f"`{argument}` must be an NNX module or a tree of arrays, got"
            f" {type(tree).__name__}"
        )
    return found


def _dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _renamed(rename, name):
    if rename is None:
        return name
    if isinstance(rename, Mapping):
        parts = name.split(".")
        for count in range(len(parts), 0, -1):  # The longest path first.
            start = ".".join(parts[:count])
            if start in rename:
                return ".".join(filter(None, [rename[start], *parts[count:]]))
        return name
    renamed = rename(name)
    if not isinstance(renamed, str):
        raise TypeError(f"`rename` must return a name for {name!r}, got {renamed!r}")
    return renamed


def _pieces(name, shape):
    """The names of the tensors that a name with ``{}`` stands for, with their indices.

    Each ``{}`` is the index along one of the first axes.
    """
    stacked = name.count("{}")
    if stacked > len(shape):
        raise ValueError(
            f"`rename` must give {len(shape)} places for an index at most, got {name!r}"
            f" for the shape {shape}"
        )
    indices = np.ndindex(shape[:stacked])
    return {_numbered(name, index): index for index in indices}


def _numbered(name, index):
    for number in index:
        name = name.replace("{}", str(number), 1)
    return name


# What the tensors are put into.


def _matched(parameters, tensors, rename, prefix):
    """For the number of each parameter its tensors by index; and what is left over."""
    parts, used = {}, set()
    missing, wrong_shape, wrong_dtype, untied = [], {}, {}, {}
    for number, parameter in enumerate(parameters):
        names = [prefix + _renamed(rename, name) for name in parameter.names]
        pieces = [_found(name, parameter.file_shape, tensors) for name in names]
        pieces = [found for found in pieces if found]
        if not pieces:
            missing.append(names[0])
            continue
        used |= {name for found in pieces for name in found}
        first, *others = pieces
        for name, index in first.items():
            tensor, expected = tensors[name], parameter.file_shape[len(index) :]
            dtype = parameter.value.dtype
            if tensor.shape != expected:
                wrong_shape[name] = f"expected {expected}, got {tensor.shape}"
            if tensor.dtype != dtype:
                wrong_dtype[name] = f"expected {dtype}, got {tensor.dtype}"
            elif not isinstance(parameter.value, np.ndarray) and (
                jax.dtypes.canonicalize_dtype(dtype) != dtype
            ):
                wrong_dtype[name] = f"{dtype}, which needs jax_enable_x64"
        if first.keys() & (wrong_shape.keys() | wrong_dtype.keys()):
            continue
        different = {
            second: f"it differs from {name}, which is the same parameter"
            for other in others
            for name, second in zip(first, other, strict=True)
            if not _are_equal(tensors[name], tensors[second])
        }
        untied |= different
        if not different:
            parts[number] = {index: tensors[name] for name, index in first.items()}
    unexpected = tuple(name for name in tensors if name not in used)
    left = LeftOut(tuple(missing), unexpected, wrong_shape, wrong_dtype, untied)
    return parts, left


def _are_equal(tensor, other):
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        return False
    return np.array_equal(tensor.read(), other.read(), equal_nan=True)


def _found(name, shape, tensors):
    """The tensors of a parameter, one or those of a stack, or None."""
    if "{}" in name:
        pieces = _pieces(name, shape)
        return pieces if pieces.keys() <= tensors.keys() else None
    if name in tensors:
        return {name: ()}
    # The number of a layer in a stack can stand behind any module of the path.
    parts = name.split(".")
    places = [
        ".".join([*parts[:place], "{}", *parts[place:]]) for place in range(len(parts))
    ]
    found = [_pieces(name, shape) for name in places] if len(shape) > 1 else []
    found = [pieces for pieces in found if pieces.keys() <= tensors.keys()]
    return found[0] if len(found) == 1 else None


def _filled(parameter, tensors):
    """The value of a parameter from its tensors by index, placed as the one before."""
    value = parameter.value
    shape, stacked = tuple(value.shape), len(next(iter(tensors)))
    arrays = {i: t.read().reshape(shape[stacked:]) for i, t in tensors.items()}

    def read(where):
        # A copy: what is read belongs to the file, or to PyTorch.
        chosen = [
            range(*axis.indices(n))
            for axis, n in zip(where, shape[:stacked], strict=False)
        ]
        pieces = [arrays[i][where[stacked:]] for i in itertools.product(*chosen)]
        return np.stack(pieces).reshape((*map(len, chosen), *pieces[0].shape))

    everything = tuple(slice(n) for n in shape)
    if isinstance(value, np.ndarray):
        return read(everything)
    is_placed = value.committed if isinstance(value, jax.Array) else value.sharding
    if not is_placed:
        return jnp.asarray(read(everything))
    return jax.make_array_from_callback(shape, value.sharding, read)
