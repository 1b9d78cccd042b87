"""PyTorch's checkpoints, read and written.

Our parameters have PyTorch's names and layout; those of Flax's own layers are renamed
and transposed. No bit changes. Neither PyTorch nor Flax is imported until it is needed.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlinear.torch._files import tensors_of, write
from jaxlinear.torch._matching import LeftOut as LeftOut
from jaxlinear.torch._matching import advice, filled, matched
from jaxlinear.torch._names import (
    Rename,
    check_options,
    forms_and_names,
    indexed_names,
    is_module,
    named_parameters,
)


def load(
    target: Any,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    rename: Rename | None = None,
    prefix: str = "",
    ignore: Iterable[str] = (),
) -> Any:
    """Fill a layer or a model with the parameters of a PyTorch checkpoint.

    A parameter is called by its path, as PyTorch calls it:
    ``encoder.layers.0.linear1.weight``. It takes the tensor of that name bit for bit
    and keeps its sharding; each device reads only its own shard of the file. In an NNX
    model every ``nnx.Param`` and ``nnx.BatchStat`` is filled, in a tree of Linen
    variables every array, whose name omits ``params`` and the other collections.

    - Flax's own layers have PyTorch's names: ``weight`` for the ``scale`` of a norm and
      the ``embedding`` of an ``Embed``, ``running_mean`` and ``running_var`` for
      ``mean`` and ``var``, whose ``num_batches_tracked`` is ignored. A source with
      Flax's names also loads. The ``kernel`` of an ``nnx.Linear``,
      ``nnx.LinearGeneral`` or ``nnx.Conv`` is PyTorch's ``weight``, transposed. In
      Linen's variables a name does not tell the layer, so a ``kernel`` stays one.
    - A tied parameter has several names. The source must have one of them; the tensors
      of further ones must have the same values.
    - A parameter of stacked layers, as ``nnx.vmap`` and ``nn.scan`` make, with the
      shape (L, out, in), takes L tensors: ``layers.weight`` is ``layers.0.weight`` and
      so on if the source has these; otherwise ``rename`` says where the number is, by
      ``{}``.
    - The weight (*out, *in) of a layer with several axes takes PyTorch's matrix.
    - A weight that is (in, out) in the source, as in a ``Conv1D`` of Hugging Face's
      GPT-2, must be transposed by the caller. If the shapes show it, the error says so,
      and square weights beside such ones are refused with them.

    Args:
      target: an NNX module, which is filled in place, or a tree of arrays, such as
        Linen's variables, of which a new one is returned. Its leaves may be
        ``jax.ShapeDtypeStruct``, as ``nnx.eval_shape`` and ``jax.eval_shape`` make, so
        that there is one copy in memory.
      source: a state dict (of PyTorch tensors, or other arrays), or the path of a file:
        ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` and Lightning's ``.ckpt``,
        which PyTorch reads with ``weights_only=True``; or ``.safetensors.index.json``
        or ``.bin.index.json`` with the files beside it.
      strict: whether it is an error if something is left out.
      rename: the name in the source of a parameter here, as a function, or as a mapping
        from the path of a parameter or module to another, ``""`` for none:
        ``{"norm": "ln_f", "blocks": "transformer.h.{}"}``. The last part of a path is
        Flax's, ``norm.scale``; unless it is renamed, it becomes PyTorch's. A tuple of
        names is for a parameter that is tied in the source and not here:
        ``{"wte.embedding": ("wte.weight", "lm_head.weight")}``.
      prefix: the beginning of these names in the source. Tensors without it are
        ignored.
      ignore: tensors of the source that may be left over, such as buffers, by name or
        by shell pattern: ``["*.attn.bias"]``.

    Returns:
      For a module, a :class:`LeftOut`, which is empty if ``strict``. For a tree, the
      new tree, and if not ``strict`` a tuple of it and a :class:`LeftOut`.

    Raises:
      ValueError: if something is left out and ``strict``, with a list of it; if
        ``rename`` has a path that is not in the target; or if a file is not whole. The
        target is then unchanged.
      TypeError: if the target is neither a module nor a tree of arrays, the source is
        neither a path nor a state dict of dense tensors (a ``DTensor`` is not one), or
        an option has another type.
      OSError: if a file cannot be read.

    Example:
      >>> import jax.numpy as jnp, jaxlinear.torch
      >>> variables = {"params": {"up": {"weight": jnp.zeros((2, 3))}}}
      >>> state = {"model.up.weight": jnp.ones((2, 3))}
      >>> jaxlinear.torch.load(variables, state, prefix="model.")
      {'params': {'up': {'weight': Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)}}}
    """
    parameters = named_parameters(target, "target")
    check_options(parameters, rename, prefix, ignore)
    tensors = tensors_of(source)
    parts, left_out = matched(parameters, tensors, rename, prefix, [*ignore])
    if strict and any(left_out):
        raise ValueError(
            f"`source` must fit `target`, of which nothing was changed:\n{left_out}"
            f"{advice(parameters, tensors, rename, prefix)}"
        )
    # All are read before the first is set.
    values = {i: filled(parameters[i], *part) for i, part in parts.items()}
    if not is_module(target):
        leaves, structure = jax.tree.flatten(target)
        for i, value in values.items():
            leaves[parameters[i].place] = value
        tree = jax.tree.unflatten(structure, leaves)
        return tree if strict else (tree, left_out)
    for i, value in values.items():
        parameters[i].place.set_value(value)
    return left_out


def save(
    source: Any,
    path: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    prefix: str = "",
) -> None:
    """Write the parameters of a layer or a model to a file that PyTorch can load.

    The names are as in :func:`load`. A tied parameter is written under each of its
    names, a weight of several axes as a matrix. Stacked layers are written as one
    tensor, or one for each layer if ``rename`` has a ``{}`` for the number.

    The file is replaced as a whole: it is written beside the old one, flushed to the
    disk, and renamed. A process that is killed leaves the old file or the new one.

    Args:
      source: an NNX module, or a tree of arrays, such as Linen's variables.
      path: a file, whose ending is its format: ``.safetensors``, ``.pt``, ``.pth`` or
        ``.bin``. For ``.safetensors.index.json`` files of at most 5 GB, or of one
        larger tensor, are written beside it, with new names. The files of an index that
        it replaces are removed.
      rename: as in :func:`load`.
      prefix: as in :func:`load`.

    Raises:
      ValueError: if two parameters have the same name, the value of one is not here (it
        is a ``jax.ShapeDtypeStruct``, or partly on devices of other processes), the
        format does not have its dtype, or ``rename`` has a path that is not in the
        source.
      TypeError: if the source is neither a module nor a tree of arrays, or an option
        has another type.
      OSError: if the file cannot be written, with the path.

    Example:
      >>> import jax.numpy as jnp, jaxlinear.torch, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> jaxlinear.torch.save({"weight": jnp.ones((2, 3))}, path)
      >>> jaxlinear.torch.load({"weight": jnp.zeros((2, 3))}, path)
      {'weight': Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)}
    """
    parameters = named_parameters(source, "source")
    check_options(parameters, rename, prefix)
    arrays = {}
    for parameter in parameters:
        value = parameter.value
        is_array = isinstance(value, jax.Array)
        is_elsewhere = is_array and not value.is_fully_addressable
        if is_elsewhere or isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`source` must have its values in this process, got"
                f" {parameter.names[0]!r}, a {type(value).__name__}"
            )
        form, names = forms_and_names(parameter, rename, prefix)[0]
        for name in names:
            for full, index in indexed_names(name, form.shape).items():
                if full in arrays:
                    raise ValueError(f"`rename` must not give {full!r} twice")
                arrays[full] = _tensor(value, form, index)
    write(Path(path), arrays)


def _tensor(value, form, index):
    """The tensor of a parameter at an index of its stack."""
    shape = form.shape[len(index) :]
    if not form.order and shape == value.shape:
        return value
    array = np.asarray(value)
    if form.order:
        array = array.transpose(form.order)
    return array[index].reshape(shape)
