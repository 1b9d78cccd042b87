"""PyTorch's checkpoints: parameters by the names that PyTorch has, both ways.

Our parameters have PyTorch's names and layout, and Flax's own layers are given them:
no bit changes. Neither PyTorch nor Flax is imported before it is needed.
"""

import difflib
import fnmatch
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._arguments import ARRAYS
from jaxlinear._state_dicts import tensors_of, write

Names = str | tuple[str, ...]
"""A name, or the several that a tied parameter has."""

Rename = Callable[[str], Names] | Mapping[str, Names]
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
      perhaps_transposed: square weights, whose shape cannot tell, and what speaks for
        it: a weight beside them that came transposed, or that one is a ``weight``
        (out, in) and the other a ``kernel`` (in, out).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: dict[str, str] = {}  # noqa: RUF012 (of a NamedTuple, never changed)
    wrong_dtype: dict[str, str] = {}  # noqa: RUF012
    untied: dict[str, str] = {}  # noqa: RUF012
    perhaps_transposed: dict[str, str] = {}  # noqa: RUF012

    def __str__(self) -> str:
        lines = []
        for field, entries in self._asdict().items():
            if isinstance(entries, dict):
                entries = [f"{name}: {why}" for name, why in entries.items()]
            title = field.replace("_", " ")
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
    ignore: Iterable[str] = (),
) -> Any:
    """Fill a layer or a model with the parameters of a PyTorch checkpoint.

    A parameter is called by its path, as PyTorch calls it:
    ``encoder.layers.0.linear1.weight``. It takes the tensor of that name bit for bit;
    it keeps its sharding, and each device reads its own shard of the file alone. What
    is filled are the ``nnx.Param`` and ``nnx.BatchStat`` of an NNX model, or the arrays
    of a tree of Linen variables, whose names leave out ``params`` and the other
    collections.

    - Flax's own layers have PyTorch's names: ``weight`` for the ``scale`` of a norm and
      the ``embedding`` of an ``Embed``, ``running_mean`` and ``running_var`` for
      ``mean`` and ``var``, whose ``num_batches_tracked`` is ignored. A source with
      Flax's names is also taken. The ``kernel`` of an ``nnx.Linear``,
      ``nnx.LinearGeneral`` or ``nnx.Conv`` is PyTorch's ``weight``, transposed. In
      Linen's variables, where a name does not tell the layer, a ``kernel`` stays one.
    - A tied parameter has several names, of which the source must have one; the others
      must have the same values.
    - A parameter of stacked layers, as ``nnx.vmap`` and ``nn.scan`` make, with the
      shape (L, out, in), takes L tensors: ``layers.weight`` is ``layers.0.weight`` and
      so on where the source has those, or wherever ``rename`` puts a ``{}``.
    - The weight (*out, *in) of a layer with several axes takes PyTorch's matrix.
    - A weight of the source that is (in, out), as those of a ``Conv1D`` of Hugging
      Face's GPT-2, must be transposed by the caller. Where shapes show it, the error
      says so, and a square weight beside such ones is refused with them.

    Args:
      target: an NNX module, which is filled in place, or a tree of arrays, such as
        Linen's variables, of which a new one is returned. Its leaves may be
        ``jax.ShapeDtypeStruct``, as ``nnx.eval_shape`` and ``jax.eval_shape`` make, so
        that there is one copy in memory.
      source: a state dict (of PyTorch tensors, or other arrays), or the path of a file:
        ``.safetensors``, or ``.pt``, ``.pth``, ``.bin`` and Lightning's ``.ckpt``,
        which PyTorch reads with ``weights_only=True``; or ``.safetensors.index.json``
        or ``.bin.index.json`` with the files beside it.
      strict: whether to refuse a source that does not fit in all of its tensors.
      rename: the name in the source of a parameter here, as a function, or as a mapping
        from the path of a parameter or module to another, ``""`` for none:
        ``{"norm": "ln_f", "blocks": "transformer.h.{}"}``. The last part of a path is
        Flax's, ``norm.scale``; where it is kept, it becomes PyTorch's. A tuple of names
        is for a parameter that is tied in the source and not here:
        ``{"wte.embedding": ("wte.weight", "lm_head.weight")}``.
      prefix: what stands before these names. Other tensors of the source are not
        looked at.
      ignore: tensors of the source that may be left over, such as buffers, by their
        names or by patterns of the shell: ``["*.attn.bias"]``.

    Returns:
      For a module, a :class:`LeftOut`, which is empty if ``strict``. For a tree, the
      new tree, and if not ``strict`` a tuple of it and a :class:`LeftOut`.

    Raises:
      ValueError: if the source does not fit, with all that is missing, unexpected or of
        another shape or dtype; if ``rename`` has a path that is not in the target; or
        if a file is not whole. Nothing is changed then.
      TypeError: if the target is neither a module nor a tree of arrays, the source
        neither a path nor a state dict of dense tensors (a ``DTensor`` is not one), or
        an option of another kind.
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
    _check_names(parameters, rename, prefix, ignore)
    tensors = tensors_of(source)
    parts, left_out = _matched(parameters, tensors, rename, prefix, [*ignore])
    if strict and any(left_out):
        raise ValueError(
            f"`source` must fit `target`, of which nothing was changed:\n{left_out}"
            f"{_advice(parameters, tensors, rename, prefix)}"
        )
    # All are read before the first is put into its place.
    values = {i: _filled(parameters[i], *part) for i, part in parts.items()}
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
    source: Any,
    path: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    prefix: str = "",
) -> None:
    """Write the parameters of a layer or a model to a file that PyTorch can load.

    The names are those of :func:`load`. A tied parameter is written under each of its
    names, a weight of several axes as a matrix; stacked layers as they are, or as one
    tensor for each layer where ``rename`` puts a ``{}``.

    The file is replaced as a whole: it is written beside the old one, brought to the
    disk, and renamed. A process that is killed leaves the old file or the new one.

    Args:
      source: an NNX module, or a tree of arrays, such as Linen's variables.
      path: a file, whose end says of what kind it is: ``.safetensors``, ``.pt``,
        ``.pth`` or ``.bin``. ``.safetensors.index.json`` writes files of at most 5 GB
        beside it, with new names, and removes those of the index that it replaces.
      rename: as in :func:`load`.
      prefix: as in :func:`load`.

    Raises:
      ValueError: if two parameters have the same name, one has no value here (it is a
        ``jax.ShapeDtypeStruct``, or partly on devices of other processes), the file
        cannot have its dtype, or ``rename`` has a path that is not in the source.
      TypeError: if the source is neither a module nor a tree of arrays, or an option of
        another kind.
      OSError: if the file cannot be written, with the path.

    Example:
      >>> import jax.numpy as jnp, jaxlinear.torch, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> jaxlinear.torch.save({"weight": jnp.ones((2, 3))}, path)
      >>> jaxlinear.torch.load({"weight": jnp.zeros((2, 3))}, path)
      {'weight': Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)}
    """
    parameters = _parameters(source, "source")
    _check_names(parameters, rename, prefix)
    arrays = {}
    for parameter in parameters:
        value = parameter.value
        if isinstance(value, jax.ShapeDtypeStruct) or (
            isinstance(value, jax.Array) and not value.is_fully_addressable
        ):
            raise ValueError(
                f"`source` must have its values in this process, got"
                f" {parameter.names[0]!r}, a {type(value).__name__}"
            )
        form, names = _forms_and_names(parameter, rename, prefix)[0]
        for name in names:
            for full, index in _pieces(name, form.shape).items():
                if full in arrays:
                    raise ValueError(f"`rename` must not give {full!r} twice")
                shape = form.shape[len(index) :]
                is_whole = not form.order and shape == value.shape
                arrays[full] = (
                    value if is_whole else _there(value, form)[index].reshape(shape)
                )
    write(Path(path), arrays)


def _there(value, form):
    array = np.asarray(value)
    return array.transpose(form.order) if form.order else array


# The parameters, and what they are called.


class _Form(NamedTuple):
    """What a parameter is like in a checkpoint.

    Attributes:
      shape: with several axes of a layer as one.
      last: what stands at the end of its name, for what stands there here.
      order: the axes here in the order that they have there, unless it is the same.
    """

    shape: tuple[int, ...]
    last: Mapping[str, str] = {}
    order: tuple[int, ...] = ()


class _Parameter(NamedTuple):
    """A parameter by all its names, where it is put, and its forms, PyTorch's first."""

    names: tuple[str, ...]
    value: Any
    place: Any
    forms: tuple[_Form, ...]


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
    # Where two would have the same name in PyTorch, they keep theirs.
    theirs = [
        {name for path in p.names for name in _names_of(path, p.forms[0], None)}
        for p in found
    ]
    counts = Counter(itertools.chain(*theirs))
    return [
        p._replace(forms=p.forms[-1:]) if any(counts[name] > 1 for name in names) else p
        for p, names in zip(found, theirs, strict=True)
    ]


def _of_module(module):
    from flax import nnx

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    names, variables, forms = {}, {}, {}
    for path, node in jax.tree.leaves_with_path(module, is_leaf=is_variable):
        if isinstance(node, (nnx.Param, nnx.BatchStat)):
            variables[id(node)] = node
            names.setdefault(id(node), []).append(_dotted(path))
    for _, layer in nnx.iter_modules(module):
        for name, form in _forms_in(layer):
            # What two layers share has the names that it has in both.
            key = id(getattr(layer, name))
            last = forms[key].last if key in forms else {}
            forms[key] = form._replace(last={**last, **form.last})
    return [
        _Parameter(
            tuple(names[key]),
            variable.get_value(),
            variable,
            _forms(forms.get(key, _Form(variable.shape)), variable),
        )
        for key, variable in variables.items()
    ]


def _forms(form, array):
    """PyTorch's form, and the one here where the name is another."""
    return (form, _Form(tuple(array.shape))) if form.last else (form,)


def _forms_in(layer):
    """PyTorch's forms of the parameters of a layer, by their names here."""
    from flax import nnx

    import jaxlinear.nnx
    from jaxlinear._kernels import axes_of

    norms = nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.BatchNorm
    # The last axes of each in groups, and the order in which PyTorch has the groups.
    if isinstance(layer, jaxlinear.nnx.Linear):
        ins, outs = axes_of(layer.in_features, layer.out_features)
        groups = {"weight": ((outs, ins), (0, 1)), "bias": ((outs,), (0,))}
    elif isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
        ins, outs = axes_of(layer.in_features, layer.out_features)
        groups = {"kernel": ((ins, outs), (1, 0)), "bias": ((outs,), (0,))}
    elif isinstance(layer, nnx.Conv):
        *spatial, ins, outs = range(len(layer.kernel_shape))
        groups = {"kernel": ((1,) * (outs + 1), (outs, ins, *spatial))}
    elif isinstance(layer, (nnx.Embed, *norms)):
        groups = dict.fromkeys(("embedding", "scale", "mean", "var"), ((), ()))
    else:
        return
    for name, (counts, order) in groups.items():
        variable = getattr(layer, name, None)
        if isinstance(variable, nnx.Variable):
            last = {name: _NAMES[name]} if name in _NAMES else {}
            yield name, _form(variable.shape, counts, order, last)


_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""What PyTorch calls the parameters of Flax's layers."""

_NAMES_IN_LINEN = {
    "params": {name: _NAMES[name] for name in ("scale", "embedding")},
    "batch_stats": {name: _NAMES[name] for name in ("mean", "var")},
}
"""The same where nothing but the name tells the layer: a kernel can be any layer's."""


def _form(shape, counts, order, last):
    """The form of a shape with its last axes in groups of these numbers, reordered."""
    leading = len(shape) - sum(counts)
    ends = list(itertools.accumulate(counts, initial=leading))
    groups = [range(ends[i], ends[i + 1]) for i in order]
    merged = (math.prod(shape[axis] for axis in group) for group in groups)
    axes = (*range(leading), *itertools.chain(*groups))
    is_reordered = axes != tuple(range(len(shape)))
    return _Form((*shape[:leading], *merged), last, axes if is_reordered else ())


def _of_tree(tree, argument):
    has_collections = isinstance(tree, Mapping) and "params" in tree
    found = []
    for place, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if isinstance(leaf, ARRAYS):
            last = {}
            if has_collections:  # Which are no part of the name.
                last = _NAMES_IN_LINEN.get(_dotted(path[:1]), {})
                path = path[1:]
            if path and path[-1] == jax.tree_util.GetAttrKey("value"):
                path = path[:-1]  # Nor is a box around the array.
            form = _Form(tuple(leaf.shape), last)
            found.append(_Parameter((_dotted(path),), leaf, place, _forms(form, leaf)))
    if not found and jax.tree.leaves(tree):
        raise TypeError(
            f"`{argument}` must be an NNX module or a tree of arrays, got"
            f" {type(tree).__name__}"
        )
    return found


def _dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _forms_and_names(parameter, rename, prefix):
    """The forms that a parameter can have by its names there, and these names."""
    found = []
    for form in parameter.forms:
        names = [
            prefix + name
            for path in parameter.names
            for name in _names_of(path, form, rename)
        ]
        # What has not PyTorch's name is not taken to have PyTorch's order of axes.
        if not form.order or all(_last(name) in form.last.values() for name in names):
            found.append((form, names))
    return found


def _names_of(path, form, rename):
    names, is_whole = _renamed(rename, path)
    last = _last(path)
    if is_whole or last not in form.last:
        return names
    return [
        name.removesuffix(last) + form.last[last] if _last(name) == last else name
        for name in names
    ]


def _last(name):
    return name.rpartition(".")[2]


def _renamed(rename, path):
    """The names of a parameter, and whether each was given as a whole."""
    if rename is None:
        return [path], False
    if isinstance(rename, Mapping):
        parts = path.split(".")
        for count in range(len(parts), 0, -1):  # The longest path first.
            start = ".".join(parts[:count])
            if start in rename:
                rest = parts[count:]
                names = _checked_names(rename[start], start)
                return [".".join(filter(None, [n, *rest])) for n in names], not rest
        return [path], False
    return _checked_names(rename(path), path), False


def _checked_names(names, path):
    found = [*names] if isinstance(names, tuple) else [names]
    if not found or not all(isinstance(name, str) for name in found):
        raise TypeError(f"`rename` must return a name for {path!r}, got {names!r}")
    return found


def _check_names(parameters, rename, prefix, ignore=()):
    """Refuse options of another kind, and paths that lead nowhere."""
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be a string, got {prefix!r}")
    if isinstance(ignore, str):
        raise TypeError(f"`ignore` must be a list of names, got {ignore!r}")
    if rename is None or (callable(rename) and not isinstance(rename, Mapping)):
        return
    if not isinstance(rename, Mapping):
        kind = type(rename).__name__
        raise TypeError(f"`rename` must be a function or a mapping, got {kind}")
    paths = {
        ".".join(parts[:count])
        for parameter in parameters
        for parts in (name.split(".") for name in parameter.names)
        for count in range(len(parts), 0, -1)
    }
    for path in rename:
        if path not in paths:
            ends = sorted(known for known in paths if known.endswith(f".{path}"))
            similar = ends or difflib.get_close_matches(str(path), sorted(paths))
            advice = f". Did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(
                "`rename` must have paths of parameters or modules, got"
                f" {path!r}{advice}"
            )


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


def _matched(parameters, tensors, rename, prefix, ignore):
    """For the number of a parameter its form and tensors; and what is left over."""
    parts, used, weights = {}, set(), {}
    missing, wrong_shape, wrong_dtype, untied = [], {}, {}, {}
    for number, parameter in enumerate(parameters):
        found = _found_in(parameter, tensors, rename, prefix)
        if not found:
            missing.append(_forms_and_names(parameter, rename, prefix)[0][1][0])
            continue
        form, pieces = found
        for name in itertools.chain(*pieces):
            used.add(name)
            if _last(name) == "running_mean":
                # PyTorch's count of the batches, for which there is no place here.
                used.add(name.removesuffix("running_mean") + "num_batches_tracked")
        first, *others = pieces
        for name, index in first.items():
            tensor, expected = tensors[name], form.shape[len(index) :]
            dtype = parameter.value.dtype
            if tensor.shape != expected:
                is_permuted = sorted(tensor.shape) == sorted(expected)
                advice = " (transposed?)" if is_permuted else ""
                wrong_shape[name] = f"expected {expected}, got {tensor.shape}{advice}"
            if tensor.dtype != dtype:
                wrong_dtype[name] = f"expected {dtype}, got {tensor.dtype}"
            elif not isinstance(parameter.value, np.ndarray) and (
                jax.dtypes.canonicalize_dtype(dtype) != dtype
            ):
                wrong_dtype[name] = f"{dtype}, which needs jax_enable_x64"
            path = parameter.names[0]
            # Matrices and stacks of them; a reordered one of three axes is of a Conv.
            is_matrix = len(expected) in ((2,) if form.order else (2, 3))
            if is_matrix and _last(path) in ("weight", "kernel"):
                shapes = expected, tensor.shape
                weights[name] = _Weight(number, *shapes, "" if form.order else path)
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
            parts[number] = form, {i: tensors[name] for name, i in first.items()}
    perhaps_transposed = _perhaps_transposed(weights)
    for name in perhaps_transposed:
        parts.pop(weights[name].number, None)
    unexpected = tuple(
        name
        for name in tensors
        if name.startswith(prefix)
        and name not in used
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    )
    left = LeftOut(
        tuple(missing),
        unexpected,
        wrong_shape,
        wrong_dtype,
        untied,
        perhaps_transposed,
    )
    return parts, left


class _Weight(NamedTuple):
    """A weight of the source: whose it is, and its path if its axes stay in order."""

    number: int
    expected: tuple[int, ...]
    shape: tuple[int, ...]
    path: str


def _perhaps_transposed(weights):
    """Why square weights may be (in, out) instead of (out, in), by their names."""
    squares, right, turned = {}, {}, {}
    for name, weight in weights.items():
        *stacked, outs, ins = weight.expected
        fits = weight.shape == weight.expected
        if outs == ins and fits:
            if outs > 1:
                squares[name] = weight
        elif fits:
            right |= dict.fromkeys(_modules_around(name), name)
        elif weight.shape == (*stacked, ins, outs):
            turned |= dict.fromkeys(_modules_around(name), name)
    reasons = {}
    for name, weight in squares.items():
        around = [m for m in _modules_around(name) if m in turned or m in right]
        if around and around[0] in turned:
            reasons[name] = f"as {turned[around[0]]} is"
        elif not around and {_last(name), _last(weight.path)} == {"weight", "kernel"}:
            names = "a weight is (out, in), a kernel (in, out)"
            reasons[name] = f"for {weight.path}: {names}"
    return reasons


def _modules_around(name):
    """The modules that a parameter's layer is in, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 2, -1, -1)]


def _found_in(parameter, tensors, rename, prefix):
    """The form of a parameter in the source, and its tensors by each of its names."""
    for form, names in _forms_and_names(parameter, rename, prefix):
        pieces = [_found(name, form.shape, tensors) for name in names]
        if pieces := [found for found in pieces if found]:
            return form, pieces
    return None


_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DistributedDataParallel, torch.compile and others put into names."""


def _advice(parameters, tensors, rename, prefix):
    """How more of the parameters would be found in the source, if that is known."""

    def count(tensors, prefix):
        found = (_found_in(p, tensors, rename, prefix) for p in parameters)
        return sum(map(bool, found))

    heads = Counter(
        name[: dot.end()] for name in tensors for dot in re.finditer(r"\.", name)
    )
    likely = [head for head, n in heads.items() if 2 * n >= len(parameters)]
    now, bare = count(tensors, prefix), {_WRAPPERS.sub("", n): n for n in tensors}
    best = max(["", *likely], key=lambda head: count(tensors, head))
    if (found := count(tensors, best)) > now:
        how = f"with `prefix={best!r}`"
    elif (found := count(bare, prefix)) > now:
        wrappers = sorted(
            {part for name in tensors for part in _WRAPPERS.findall(name)}
        )
        how = f"without {' and '.join(wrappers)} in the names of the source"
    else:
        return ""
    return f"\n{found} of {len(parameters)} parameters are found {how}"


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


def _filled(parameter, form, tensors):
    """The value of a parameter from its tensors by index, placed as the one before."""
    value = parameter.value
    order = form.order or tuple(range(value.ndim))
    shape, stacked = [value.shape[axis] for axis in order], len(next(iter(tensors)))
    arrays = {i: t.read().reshape(shape[stacked:]) for i, t in tensors.items()}

    def read(where):
        # A copy: what is read belongs to the file, or to PyTorch.
        where = tuple(where[axis] for axis in order)
        chosen = [
            range(*axis.indices(n))
            for axis, n in zip(where, shape[:stacked], strict=False)
        ]
        pieces = [arrays[i][where[stacked:]] for i in itertools.product(*chosen)]
        there = np.stack(pieces).reshape((*map(len, chosen), *pieces[0].shape))
        return there.transpose(np.argsort(order))

    everything = tuple(slice(n) for n in value.shape)
    if isinstance(value, np.ndarray):
        return read(everything)
    is_placed = value.committed if isinstance(value, jax.Array) else value.sharding
    if not is_placed:
        return jnp.asarray(read(everything))
    return jax.make_array_from_callback(value.shape, value.sharding, read)
