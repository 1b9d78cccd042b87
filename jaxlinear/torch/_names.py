"""The parameters of a model, and what they are called in a checkpoint."""

import difflib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr

from jaxlinear._checks import ARRAYS

Names = str | tuple[str, ...]
"""A name, or the several that a tied parameter has."""

Rename = Callable[[str], Names] | Mapping[str, Names]
"""From a parameter's name here to its names in the checkpoint."""


class Form(NamedTuple):
    """A form that a parameter can have in a checkpoint.

    Attributes:
      shape: its shape there, with several input or output axes of a layer as one.
      endings: how its name ends there, by how it ends here: ``{"kernel": "weight"}``.
      order: the axes here in the order that they have there; empty if it is the same.
    """

    shape: tuple[int, ...]
    endings: Mapping[str, str] = {}
    order: tuple[int, ...] = ()


class Parameter(NamedTuple):
    """A parameter of a model.

    Attributes:
      names: its paths, of which a tied parameter has several.
      value: its array.
      place: where a new value is put: an NNX variable, or the number of a leaf.
      forms: its forms, PyTorch's first.
    """

    names: tuple[str, ...]
    value: Any
    place: Any
    forms: tuple[Form, ...]


def is_module(target):
    flax = sys.modules.get("flax")  # If nobody has imported it, nothing is a module.
    return flax is not None and isinstance(target, flax.nnx.Module)


def named_parameters(tree, argument):
    """The parameters of a module or a tree."""
    if is_module(tree):
        parameters = _module_parameters(tree)
    else:
        parameters = _tree_parameters(tree, argument)
    names = Counter(itertools.chain(*(parameter.names for parameter in parameters)))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(
            f"`{argument}` must have one parameter for a name, got {twice}"
        )
    names_there = [
        {_name_there(name, parameter.forms[0]) for name in parameter.names}
        for parameter in parameters
    ]
    counts = Counter(itertools.chain(*names_there))
    for i, names in enumerate(names_there):
        # Two that would have the same name in PyTorch keep their names.
        if any(counts[name] > 1 for name in names):
            parameters[i] = parameters[i]._replace(forms=parameters[i].forms[-1:])
    return parameters


def _module_parameters(module):
    from flax import nnx

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    names, variables, forms = {}, {}, {}
    for path, node in jax.tree.leaves_with_path(module, is_leaf=is_variable):
        if isinstance(node, (nnx.Param, nnx.BatchStat)):
            variables[id(node)] = node
            names.setdefault(id(node), []).append(
                keystr(path, simple=True, separator=".")
            )
    for _, layer in nnx.iter_modules(module):
        for name, form in _forms_in(layer):
            # A variable of two layers has the endings of both.
            key = id(getattr(layer, name))
            endings = forms[key].endings if key in forms else {}
            forms[key] = form._replace(endings={**endings, **form.endings})
    return [
        Parameter(
            tuple(names[key]),
            variable.get_value(),
            variable,
            _forms(forms.get(key, Form(variable.shape)), variable),
        )
        for key, variable in variables.items()
    ]


def _forms(form, array):
    """PyTorch's form, and Flax's if the name differs."""
    return (form, Form(tuple(array.shape))) if form.endings else (form,)


def _forms_in(layer):
    """PyTorch's forms of the parameters of a layer, by their names here."""
    from flax import nnx

    import jaxlinear.nnx
    from jaxlinear._flax.layout import axis_counts

    norms = nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.BatchNorm
    # By parameter: the sizes of groups of its last axes, and PyTorch's order of groups.
    if isinstance(layer, jaxlinear.nnx.Linear):
        ins, outs = axis_counts(layer.in_features, layer.out_features)
        groups = {"weight": ((outs, ins), (0, 1)), "bias": ((outs,), (0,))}
    elif isinstance(layer, (nnx.Linear, nnx.LinearGeneral)):
        ins, outs = axis_counts(layer.in_features, layer.out_features)
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
            endings = {name: _ENDINGS[name]} if name in _ENDINGS else {}
            yield name, _form(variable.shape, counts, order, endings)


_ENDINGS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""What PyTorch calls the parameters of Flax's layers."""

_ENDINGS_IN_LINEN = {
    "params": {name: _ENDINGS[name] for name in ("scale", "embedding")},
    "batch_stats": {name: _ENDINGS[name] for name in ("mean", "var")},
}
"""The same by collection, if only the name tells the layer: any layer has a kernel."""


def _form(shape, counts, order, endings):
    """The form of a shape whose last axes are in groups of these sizes, reordered."""
    leading = len(shape) - sum(counts)
    ends = list(itertools.accumulate(counts, initial=leading))
    groups = [range(ends[i], ends[i + 1]) for i in order]
    merged = (math.prod(shape[axis] for axis in group) for group in groups)
    axes = (*range(leading), *itertools.chain(*groups))
    is_reordered = axes != tuple(range(len(shape)))
    return Form((*shape[:leading], *merged), endings, axes if is_reordered else ())


def _tree_parameters(tree, argument):
    has_collections = isinstance(tree, Mapping) and "params" in tree
    parameters = []
    for place, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        if isinstance(leaf, ARRAYS):
            # Neither a collection nor the box around an array is part of the name.
            endings = {}
            if has_collections:
                endings = _ENDINGS_IN_LINEN.get(keystr(path[:1], simple=True), {})
                path = path[1:]
            if path and path[-1] == jax.tree_util.GetAttrKey("value"):
                path = path[:-1]
            name = keystr(path, simple=True, separator=".")
            forms = _forms(Form(tuple(leaf.shape), endings), leaf)
            parameters.append(Parameter((name,), leaf, place, forms))
    if not parameters and jax.tree.leaves(tree):
        raise TypeError(
            f"`{argument}` must be an NNX module or a tree of arrays, got"
            f" {type(tree).__name__}"
        )
    return parameters


# Names.


def forms_and_names(parameter, rename, prefix):
    """The forms that a parameter can have in the checkpoint, and its names in each."""
    forms = []
    for form in parameter.forms:
        names = []
        for path in parameter.names:
            renamed, is_final = _renamed(rename, path)
            for name in renamed:
                is_kept = not is_final and ending(name) == ending(path)
                names.append(prefix + (_name_there(name, form) if is_kept else name))
        # Without PyTorch's name a parameter does not have PyTorch's order of axes.
        if not form.order or {ending(name) for name in names} <= {
            *form.endings.values()
        }:
            forms.append((form, names))
    return forms


def _name_there(name, form):
    last = ending(name)
    return name.removesuffix(last) + form.endings.get(last, last)


def ending(name):
    return name.rpartition(".")[2]


def _renamed(rename, path):
    """The names of a parameter, and whether they are names as a whole."""
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
    checked = [*names] if isinstance(names, tuple) else [names]
    if not checked or not all(isinstance(name, str) for name in checked):
        raise TypeError(f"`rename` must return a name for {path!r}, got {names!r}")
    return checked


def check_options(parameters, rename, prefix, ignore=()):
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
    paths = set()
    for name in itertools.chain(*(parameter.names for parameter in parameters)):
        parts = name.split(".")
        paths |= {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    for path in rename:
        if path not in paths:
            ends = sorted(known for known in paths if known.endswith(f".{path}"))
            similar = ends or difflib.get_close_matches(str(path), sorted(paths))
            advice = f". Did you mean {similar[0]!r}?" if similar else ""
            raise ValueError(
                "`rename` must have paths of parameters or modules, got"
                f" {path!r}{advice}"
            )


def indexed_names(name, shape):
    """The names of the tensors that a name with ``{}`` means, with their indices.

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
