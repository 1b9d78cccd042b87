"""An optimizer's state for a model whose layers were exchanged."""

import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxlinear._flax.trees import dotted, part_of_state


def exchanged_state(model, optimizer, layers, convert):
    """The optimizer's state for the exchanged layers, or an error that says why not.

    Flax's optimizers do not know their model. But the state must have the paths and
    shapes with which its transformation starts: before the exchange for the model as it
    is, afterwards for the model as it will be.
    """
    _check_optimizer(optimizer, model)
    variables, state = nnx.state(model), optimizer.opt_state
    parameters = nnx.filter_state(variables, optimizer.wrt)
    # An optimizer may have been stacked with its model. A vector in its state may then
    # be a stack of numbers.
    for stacked in range(_shared_axes(parameters) + 1):
        initial = _initial(optimizer, variables, stacked)
        if not _differing(_entries(state), _entries(initial)):
            break
    else:
        stacked, initial = 0, _initial(optimizer, variables, 0)
    _check_state_belongs(_entries(state), _entries(initial))
    _check_not_flat(_entries(state), [np.shape(p) for p in jax.tree.leaves(parameters)])
    state, _ = convert(state, layers, "optimizer")
    variables, _ = convert(variables, layers)
    try:
        initial = _initial(optimizer, variables, stacked)
    except Exception as error:
        raise ValueError(
            "`optimizer` must have a `tx` that starts for the converted model."
            f" {_BY_NAME}"
        ) from error
    _check_state_goes_on(_entries(state), _entries(initial))
    return state


def _initial(optimizer, variables, stacked):
    """The state with which the optimizer would start, without values."""
    init = optimizer.tx.init
    for _ in range(stacked):
        init = jax.vmap(init)
    parameters = nnx.filter_state(variables, optimizer.wrt)
    try:
        return jax.eval_shape(init, _mapped(_without_sharding, parameters))
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ):
        return init(parameters)  # `init` reads values.


def _without_sharding(variable):
    value = variable.get_value()
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))


def _mapped(function, tree):
    """``tree`` with the function applied to each variable."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, nnx.Variable) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


class _Entry(NamedTuple):
    """A leaf of an optimizer's state: its shape, and the part of the state it is in."""

    shape: tuple[int, ...]
    part: str


def _entries(state):
    """The entries of an optimizer's state by their paths.

    A path is names only: Flax puts mappings into a state where lists and tuples were.
    """
    values = _mapped(nnx.Variable.get_value, state)
    return {
        dotted(path): _Entry(np.shape(leaf), part_of_state(values, path))
        for path, leaf in jax.tree.leaves_with_path(values)
    }


def _shared_axes(parameters):
    """How many leading axes all have, with the same sizes."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(parameters)]
    sizes = [len(set(axis)) == 1 for axis in zip(*shapes, strict=False)]
    return (*sizes, False).index(False)


def _check_optimizer(optimizer, model):
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "`optimizer` must be a flax.nnx.Optimizer, got"
            f" {type(optimizer).__name__}: convert a plain state of Optax's by"
            " `convert_tree(state, report.converted)`"
        )
    # An nnx.ModelAndOptimizer holds its model.
    if vars(optimizer).get("model", model) is not model:
        raise ValueError("`optimizer` must belong to `model`, got one of another model")


def _check_state_belongs(state, initial):
    """Refuse the optimizer of another model."""
    for path in _differing(state, initial):
        raise ValueError(
            "`optimizer` must belong to `model`: its state has"
            f" {_kept(path, state)} at {path!r}{_part(path, state)}, where the model's"
            f" has {_kept(path, initial)}. Convert both in one call"
        )


def _check_state_goes_on(state, initial):
    """Refuse a converted state that is not one for the converted model."""
    for path in _differing(state, initial):
        raise ValueError(
            "`optimizer` must have a state that can be converted: it would have"
            f" {_kept(path, state)} at {path!r}{_part(path, state)}, where a new state"
            f" has {_kept(path, initial)}. {_BY_NAME}"
        )


def _check_not_flat(state, parameters):
    """Refuse a single vector of all parameters, which ``optax.flatten`` makes."""
    flat = (sum(map(math.prod, parameters)),)
    for path in state:
        if state[path].shape == flat and flat not in parameters:
            raise ValueError(
                "`optimizer` must keep the parameters apart: its state has one vector"
                f" of all at {path!r}{_part(path, state)}. Start it anew"
            )


_BY_NAME = (
    "A mask, a label or a filter must be a function that finds both `kernel` and"
    " `weight`; start anew a state that has other axes than its parameter"
)


def _differing(state, initial):
    """The paths at which the shapes differ, or only one state has an entry."""

    def shape(entries, path):
        return entries[path].shape if path in entries else None

    paths = sorted(state.keys() | initial.keys())
    return [path for path in paths if shape(state, path) != shape(initial, path)]


def _kept(path, state):
    return f"shape {state[path].shape}" if path in state else "nothing"


def _part(path, state):
    return state[path].part if path in state else ""
