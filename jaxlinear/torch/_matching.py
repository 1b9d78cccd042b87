"""Which tensors of a checkpoint belong to which parameters, and what is left out."""

import fnmatch
import itertools
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear.torch._names import ending, forms_and_names, indexed_names


class LeftOut(NamedTuple):
    """What :func:`load` has left out.

    Attributes:
      missing: parameters without a tensor in the source, by their names there.
      unexpected: tensors of the source that belong to no parameter.
      wrong_shape: tensors of another shape than their parameter, with both shapes.
      wrong_dtype: tensors of another dtype than their parameter, with both dtypes.
      untied: tensors under a second name of a tied parameter that differ from the
        tensor under its first name, with the first name.
      perhaps_transposed: square weights, whose shape cannot tell, with the reason for
        the suspicion: a weight beside them is transposed, or one is called ``weight``
        (out, in) and the other ``kernel`` (in, out).
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


def matched(parameters, tensors, rename, prefix, ignore):
    """For the number of a parameter its form and tensors, and what is left out."""
    parts, used, weights = {}, set(), {}
    missing, wrong_shape, wrong_dtype, untied = [], {}, {}, {}
    for number, parameter in enumerate(parameters):
        form, tied = _tensors_of(parameter, tensors, rename, prefix)
        if not tied:
            missing.append(forms_and_names(parameter, rename, prefix)[0][1][0])
            continue
        used.update(*tied)
        first, *others = tied
        for name, index in first.items():
            tensor, expected = tensors[name], form.shape[len(index) :]
            if tensor.shape != expected:
                wrong_shape[name] = _difference(expected, tensor.shape)
            if wrong := _wrong_dtype(parameter.value, tensor):
                wrong_dtype[name] = wrong
            path = parameter.names[0]
            # Matrices and stacks of them; a reordered one of three axes is a Conv's.
            is_matrix = len(expected) in ((2,) if form.order else (2, 3))
            if is_matrix and ending(path) in ("weight", "kernel"):
                shapes = expected, tensor.shape
                weights[name] = _Weight(number, *shapes, "" if form.order else path)
        if first.keys() & (wrong_shape.keys() | wrong_dtype.keys()):
            continue
        different = {}
        for other in others:
            for name, second in zip(first, other, strict=True):
                if not _are_equal(tensors[name], tensors[second]):
                    why = f"it differs from {name}, which is the same parameter"
                    different[second] = why
        untied |= different
        if not different:
            parts[number] = form, {i: tensors[name] for name, i in first.items()}
    perhaps_transposed = _perhaps_transposed(weights)
    for name in perhaps_transposed:
        parts.pop(weights[name].number, None)
    left_out = LeftOut(
        tuple(missing),
        _unexpected(tensors, used, prefix, ignore),
        wrong_shape,
        wrong_dtype,
        untied,
        perhaps_transposed,
    )
    return parts, left_out


def _difference(expected, shape):
    is_permuted = sorted(shape) == sorted(expected)
    return f"expected {expected}, got {shape}{' (transposed?)' if is_permuted else ''}"


def _wrong_dtype(value, tensor):
    """Why the tensor's dtype is wrong for this parameter, or None."""
    if tensor.dtype != value.dtype:
        return f"expected {value.dtype}, got {tensor.dtype}"
    is_numpy = isinstance(value, np.ndarray)
    if not is_numpy and jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        return f"{value.dtype}, which needs jax_enable_x64"
    return None


def _unexpected(tensors, used, prefix, ignore):
    """The names of tensors that are left over."""
    means = "running_mean"
    # PyTorch also counts the batches. There is no place for that here.
    counts = {
        name.removesuffix(means) + "num_batches_tracked"
        for name in used
        if ending(name) == means
    }
    return tuple(
        name
        for name in tensors
        if name.startswith(prefix)
        and name not in used | counts
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    )


class _Weight(NamedTuple):
    """A weight of the source.

    Attributes:
      number: the number of its parameter.
      expected: the shape that it must have.
      shape: the shape that it has.
      path: the path of its parameter, empty if axes are reordered.
    """

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
        elif not around and {ending(name), ending(weight.path)} == {"weight", "kernel"}:
            names = "a weight is (out, in), a kernel (in, out)"
            reasons[name] = f"for {weight.path}: {names}"
    return reasons


def _modules_around(name):
    """The modules that a parameter's layer is in, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 2, -1, -1)]


def _tensors_of(parameter, tensors, rename, prefix) -> tuple[Any, list]:
    """The form of a parameter in the source, and its tensors by each of its names.

    The tensors are a dict from their names to their indices in a stack.
    """
    for form, names in forms_and_names(parameter, rename, prefix):
        by_name = [_tensors_called(name, form.shape, tensors) for name in names]
        if tied := [named for named in by_name if named]:
            return form, tied
    return None, []


_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""What DistributedDataParallel, torch.compile and others add to names."""


def advice(parameters, tensors, rename, prefix):
    """How to find more of the parameters in the source, or nothing."""

    def count(tensors, prefix):
        matches = [_tensors_of(p, tensors, rename, prefix) for p in parameters]
        return sum(bool(tied) for _, tied in matches)

    heads = Counter()
    for name in tensors:
        heads.update(name[: dot.end()] for dot in re.finditer(r"\.", name))
    likely = [head for head, n in heads.items() if 2 * n >= len(parameters)]
    best = max(["", *likely], key=lambda head: count(tensors, head))
    now, found = count(tensors, prefix), count(tensors, best)
    how = f"with `prefix={best!r}`"
    if found <= now:
        wrappers = sorted(set(itertools.chain(*map(_WRAPPERS.findall, tensors))))
        found = count({_WRAPPERS.sub("", name): name for name in tensors}, prefix)
        how = f"without {' and '.join(wrappers)} in the names of the source"
    if found <= now:
        return ""
    return f"\n{found} of {len(parameters)} parameters are found {how}"


def _are_equal(tensor, other):
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        return False
    return np.array_equal(tensor.read(), other.read(), equal_nan=True)


def _tensors_called(name, shape, tensors):
    """The tensors of a parameter of this name, one or those of a stack, or None."""
    if "{}" in name:
        indexed = indexed_names(name, shape)
        return indexed if indexed.keys() <= tensors.keys() else None
    if name in tensors:
        return {name: ()}
    if len(shape) < 2:
        return None
    # The number of a layer in a stack can be behind any module of the path.
    parts, stacks = name.split("."), []
    for place in range(len(parts)):
        pattern = ".".join([*parts[:place], "{}", *parts[place:]])
        indexed = indexed_names(pattern, shape)
        if indexed.keys() <= tensors.keys():
            stacks.append(indexed)
    return stacks[0] if len(stacks) == 1 else None


def filled(parameter, form, tensors):
    """The new value of a parameter from its tensors by index, placed as the old one."""
    value = parameter.value
    order = form.order or tuple(range(value.ndim))
    shape, stacked = [value.shape[axis] for axis in order], len(next(iter(tensors)))
    arrays = {i: t.read().reshape(shape[stacked:]) for i, t in tensors.items()}

    def read(where):
        # Stacked into a copy: what is read belongs to the file or to PyTorch.
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
