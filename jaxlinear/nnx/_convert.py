"""A Flax model with our layers in the place of its own, and the way back."""

import functools
import inspect
import re
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.tree_util import keystr

from jaxlinear._arguments import (
    ARRAYS,
    check_model,
    check_module,
    check_not_flat,
    check_optimizer,
    check_state_belongs,
    check_state_goes_on,
    checked_products,
    differing,
    refuse_unstarted,
)
from jaxlinear._kernels import (
    Axes,
    axes_of,
    in_state,
    kernel_of,
    weight_of,
    with_kernels,
    with_weights,
)
from jaxlinear._product import Product, Products
from jaxlinear.nnx._linear import Linear


class Report(NamedTuple):
    """What :func:`convert` or :func:`revert` did; ``print`` shows it.

    Attributes:
      converted: the path of each layer that was replaced, with how many input and
        output axes its kernel has, as ``jaxlinear.nnx.convert_tree`` takes them.
      left_alone: the path of each linear layer that was not replaced, and why.
      lost: the path of each replaced layer that could not keep all that it said, and
        what it lost. Only Flax's layer can lose something: ``products``.
    """

    converted: dict[str, Axes]
    left_alone: dict[str, str]
    lost: dict[str, str]

    def __str__(self) -> str:
        parts = {
            "converted": list(self.converted),
            "left alone": [f"{path}: {why}" for path, why in self.left_alone.items()],
            "lost": [f"{path}: {what}" for path, what in self.lost.items()],
        }
        lines = []
        for title, entries in parts.items():
            # Layers of a list are one line.
            alike = Counter(re.sub(r"\b\d+\b", "*", entry) for entry in entries)
            lines += [f"{title} ({len(entries)}):"] if entries else []
            lines += [
                f"  {entry} ({n})" if n > 1 else f"  {entry}"
                for entry, n in alike.items()
            ]
        return "\n".join(lines) or "no linear layers"


def convert(model: nnx.Module, optimizer: nnx.Optimizer[Any] | None = None) -> Report:
    """Put our layer in the place of every linear layer of Flax in ``model``.

    It replaces each ``nnx.Linear`` and ``nnx.LinearGeneral``, the projections of
    ``nnx.MultiHeadAttention`` among them, in place and by value: the kernel becomes the
    weight, to the bit, with its sharding, its metadata and whatever kind of variable it
    is; the bias is the same variable; ``dtype``, ``param_dtype``, ``precision`` and
    ``preferred_element_type`` mean what they did. Shared layers stay shared, stacked
    ones stacked. The output is Flax's within rounding: the terms of a product may be
    added in another order, and a low-precision result is rounded once.

    Left alone, and reported, is what has an own way to its product: subclasses, among
    them ``nnx.LoRALinear``; what is inside of ``nnx.LoRA``, ``nnx.WeightNorm`` or
    ``nnx.SpectralNorm``, which look for a kernel; layers with a ``dot_general``, a
    ``promote_dtype`` or a ``batch_axis``; ``nnx.Einsum``; a layer whose kernel
    something else reads, too.

    Args:
      model: a model. A layer that is itself the model has nothing that holds it, and is
        refused: put it into an ``nnx.Sequential``.
      optimizer: the optimizer of this model, whose state is converted as well. Its
        ``tx`` stays: a mask must find ``kernel`` and ``weight`` alike, and Muon must be
        told of the axes (``dimension_numbers``). One of another model is refused by its
        paths and shapes; where these are the same, it cannot be told from a copy's. For
        a plain Optax state there is ``convert_tree(state, report.converted)``.

    Returns:
      The report. An error leaves the model and the optimizer as they were.

    Raises:
      TypeError: if ``model`` is not a module or is itself a layer, or ``optimizer`` is
        not an ``nnx.Optimizer``.
      ValueError: if the state of the optimizer is not one of this model, keeps other
        axes than the parameters (Adafactor, GaLore, ``optax.flatten``), or would not be
        the one that ``optimizer.tx`` needs for the converted model.

    Example:
      >>> from flax import nnx
      >>> import jaxlinear.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> print(jaxlinear.nnx.convert(model))
      converted (1):
        layers.*
    """
    flax = nnx.Linear, nnx.LinearGeneral, nnx.Einsum
    plan = _plan(model, flax, "kernel", _why_not_ours)
    weights = _moved_variables(plan, "kernel", weight_of)
    made = {id(layer): _ours(layer, weights) for layer, _ in plan.layers.values()}
    return _carried_out(model, optimizer, plan, made, with_weights)


def revert(model: nnx.Module, optimizer: nnx.Optimizer[Any] | None = None) -> Report:
    """Put Flax's layers back in the place of ours: the inverse of :func:`convert`.

    The parameters are equal to the bit to what they were. A layer of one input and one
    output axis becomes an ``nnx.Linear``, one with tuples an ``nnx.LinearGeneral``.
    ``products`` that Flax's layers have no argument for are lost, and reported.

    Args:
      model: a model with layers of ours. Subclasses are left alone, and what is inside
        of ``nnx.LoRA``, ``nnx.WeightNorm`` or ``nnx.SpectralNorm``.
      optimizer: as in :func:`convert`. For a plain Optax state there is
        ``revert_tree(state, report.converted)``.

    Returns:
      The report. An error leaves the model and the optimizer as they were.

    Raises:
      TypeError, ValueError: as in :func:`convert`.

    Example:
      >>> from flax import nnx
      >>> import jaxlinear.nnx
      >>> layer = jaxlinear.nnx.Linear(3, 8, products=jaxlinear.INT8, rngs=nnx.Rngs(0))
      >>> print(jaxlinear.nnx.revert(nnx.Sequential(layer, nnx.relu)))
      converted (1):
        layers.*
      lost (1):
        layers.*: products
    """
    plan = _plan(model, (Linear,), "weight", _why_not_flax)
    kernels = _moved_variables(plan, "weight", kernel_of)
    made, lost = {}, {}
    for path, (layer, _) in plan.layers.items():
        made[id(layer)], is_all = _flax(layer, kernels)
        if not is_all:
            lost[path] = "products"
    return _carried_out(model, optimizer, plan, made, with_kernels, lost)


def layers_of(
    model: nnx.Module, kinds: type | tuple[type, ...] = Linear
) -> dict[str, Axes]:
    """The linear layers in ``model``, by path, with their numbers of axes.

    That is what ``convert_tree``, ``revert_tree`` and ``dimension_numbers`` take for a
    model that was written with our layer, and so has no report.

    Args:
      model: a model.
      kinds: the layers to look for. Default: ours, and its subclasses. ``nnx.Linear``
        and ``nnx.LinearGeneral`` are possible, too.

    Returns:
      A dict from dotted paths to how many input and output axes a weight has.

    Raises:
      TypeError: if ``model`` is no module.

    Example:
      >>> from flax import nnx
      >>> import jaxlinear.nnx
      >>> layer = jaxlinear.nnx.Linear(8, (2, 4), rngs=nnx.Rngs(0))
      >>> jaxlinear.nnx.layers_of(nnx.Sequential(layer, nnx.relu))
      {'layers.0': Axes(inputs=1, outputs=2)}
    """
    check_module(model)
    return {
        _dotted(path): axes_of(node.in_features, node.out_features)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, kinds)
    }


# What is exchanged, and what is not.


# What looks for a parameter of the layer inside of it.
_WRAPPERS = nnx.LoRA, nnx.WeightNorm, nnx.SpectralNorm


class _Plan(NamedTuple):
    layers: dict[str, tuple[Any, Axes]]
    left_alone: dict[str, str]


def _plan(model, kinds, parameter, why_not):
    """The layers of these kinds in ``model``, by path, that may be exchanged."""
    check_model(model, kinds)
    nodes = dict(nnx.iter_graph(model))  # Each node once.
    found = {_dotted(p): node for p, node in nodes.items() if isinstance(node, kinds)}
    wrapped_by = {
        id(inner): type(node).__name__
        for node in nodes.values()
        if isinstance(node, _WRAPPERS)
        for _, inner in nnx.iter_graph(node)
    }
    left_alone = {}
    for path, layer in found.items():
        wrapper = wrapped_by.get(id(layer))
        why = f"it is inside of {wrapper}" if wrapper else why_not(layer)
        if why:
            left_alone[path] = why
    exchanged = {id(layer) for path, layer in found.items() if path not in left_alone}
    read_at = {
        id(child): _dotted((*path, name))
        for path, node in nodes.items()
        if id(node) not in exchanged
        for name, child in _children(node)
    }
    layers = {}
    for path, layer in found.items():
        if path in left_alone:
            continue
        variable = getattr(layer, parameter)
        if id(variable) in read_at:
            left_alone[path] = f"its {parameter} is {read_at[id(variable)]}, too"
        elif not isinstance(variable.get_value(), ARRAYS):
            left_alone[path] = f"its {parameter} is no array"
        else:
            layers[path] = layer, axes_of(layer.in_features, layer.out_features)
    return _Plan(layers, dict(sorted(left_alone.items())))


def _why_not_ours(layer):
    """Why a layer of Flax is left alone, or None."""
    kind = type(layer)
    if kind is nnx.Einsum:
        return "it is an Einsum"
    if kind not in (nnx.Linear, nnx.LinearGeneral):
        return f"{kind.__name__} is a subclass"
    if layer.dot_general not in (None, lax.dot_general):
        return "it has a dot_general"
    if layer.promote_dtype is not promote_dtype:
        return "it has a promote_dtype"
    if kind is nnx.LinearGeneral and layer.dot_general_cls is not None:
        return "it has a dot_general_cls"
    if kind is nnx.LinearGeneral and layer.batch_axis:
        return "it has a batch_axis"
    for name in "dtype", "param_dtype":
        dtype = getattr(layer, name)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            return f"its {name} is no floating dtype"
    own = vars(layer).keys() - inspect.signature(kind.__init__).parameters.keys()
    own -= {"kernel", "bias", "_pytree__state", "_pytree__nodes"}
    if own:
        return f"it has an attribute of its own: {', '.join(sorted(own))}"
    preferred = layer.preferred_element_type or layer.dtype
    if preferred is not None and jnp.finfo(preferred).bits < 16:
        return "its dtype has fewer than 16 bits, and no scale"
    if layer.preferred_element_type is None:
        return None
    preferred = jnp.dtype(layer.preferred_element_type)
    if preferred == jnp.dtype(layer.dtype or layer.param_dtype):
        return None
    if layer.dtype is None:
        return "it has a preferred_element_type and no dtype"
    if preferred.itemsize <= jnp.dtype(layer.dtype).itemsize:
        return "its preferred_element_type is no wider than its dtype"
    return None


def _why_not_flax(layer):
    """Why a layer of ours is left alone, or None."""
    return None if type(layer) is Linear else f"{type(layer).__name__} is a subclass"


# The layers themselves. They are made without values: the variables are moved in.


def _moved_variables(plan, parameter, move):
    """The variable in the place of each one, by its id: a shared one stays shared."""
    variables = {}
    for layer, axes in plan.layers.values():
        old = getattr(layer, parameter)
        if id(old) not in variables:
            variables[id(old)] = move(old, axes)
    return variables


def _without_values(kind: Any, layer, **options):
    """A layer of this kind, with what ``layer`` says in the words of both."""
    return nnx.eval_shape(
        lambda: kind(
            layer.in_features,
            layer.out_features,
            use_bias=layer.use_bias,
            param_dtype=layer.param_dtype,
            precision=layer.precision,
            rngs=nnx.Rngs(0),
            **options,
        )
    )


def _ours(layer, weights):
    dtype, products = _of_preferred(layer.dtype, layer.preferred_element_type)
    axis = getattr(layer, "axis", -1)
    options = {"axis": axis, "dtype": dtype, "products": products}
    ours = _without_values(Linear, layer, **options)
    ours.weight, ours.bias = weights[id(layer.kernel)], layer.bias
    return ours


def _flax(layer, kernels):
    """Flax's layer, and whether it says all that ours does."""
    dtype, preferred = layer.dtype, None
    operand = layer.products and layer.products.forward.dtype
    if operand is not None and not isinstance(operand, tuple):
        dtype, preferred = operand, layer.dtype
    full_dtype, products = _of_preferred(dtype, preferred)
    products = checked_products(products, None, full_dtype)
    is_all = (full_dtype, products) == (layer.dtype, layer.products)
    if not is_all:
        dtype, preferred = layer.dtype, None
    kind, options = nnx.Linear, {"dtype": dtype, "preferred_element_type": preferred}
    if isinstance(layer.in_features, tuple) or layer.axis != -1:
        kind, options = nnx.LinearGeneral, options | {"axis": layer.axis}
    flax = _without_values(kind, layer, **options)
    flax.kernel, flax.bias = kernels[id(layer.weight)], layer.bias
    return flax, is_all


def _of_preferred(dtype, preferred):
    """Our ``dtype`` and ``products`` for what Flax's layer says of all its products.

    Y is in the preferred dtype, and the operands of all three products are not.
    """
    if dtype is None or preferred is None or jnp.dtype(preferred) == jnp.dtype(dtype):
        return dtype, None
    product = Product(dtype=dtype)
    return preferred, Products(product, product, product)


# The model.


def _carried_out(model, optimizer, plan, made, exchange, lost=None):
    converted = {path: axes for path, (_, axes) in plan.layers.items()}
    if optimizer is not None:
        state = _exchanged_state(model, optimizer, converted, exchange)
        optimizer.opt_state = nnx.data(state)
    _exchange(model, made, set())
    return Report(converted, plan.left_alone, lost or {})


def _exchanged_state(model, optimizer, converted, exchange):
    """The optimizer's state for the exchanged layers, or an error that says why not.

    Flax's optimizers do not know their model. But a state has the paths and shapes with
    which its transformation starts: before, for the model as it is, and afterwards for
    the model as it will be.
    """
    check_optimizer(optimizer, model)
    variables, state = nnx.state(model), optimizer.opt_state
    parameters = nnx.filter_state(variables, optimizer.wrt)
    # An optimizer may have been stacked with its model, and a vector be a number then.
    for stacked in range(_shared_axes(parameters) + 1):
        initial = _initial(optimizer, variables, stacked)
        if not differing(_shapes(state), _shapes(initial)):
            break
    else:
        stacked, initial = 0, _initial(optimizer, variables, 0)
    check_state_belongs(_shapes(state), _shapes(initial))
    check_not_flat(_shapes(state), [np.shape(p) for p in jax.tree.leaves(parameters)])
    state, _ = exchange(state, converted, "optimizer")
    variables, _ = exchange(variables, converted)
    try:
        initial = _initial(optimizer, variables, stacked)
    except Exception as error:
        refuse_unstarted(error)
    check_state_goes_on(_shapes(state), _shapes(initial))
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
        return init(parameters)  # It looks at values.


def _without_sharding(variable):
    value = variable.get_value()
    return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype))


def _mapped(function, tree):
    """``tree`` with what the function makes of each variable."""
    return jax.tree.map(
        lambda leaf: function(leaf) if isinstance(leaf, nnx.Variable) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def _shapes(state):
    """The shapes in an optimizer's state, and in what part of it, by their paths.

    Of names alone: Flax puts mappings into a state where there were lists and tuples.
    """
    held = _mapped(nnx.Variable.get_value, state)
    return {
        keystr(path, simple=True, separator="."): (np.shape(leaf), in_state(held, path))
        for path, leaf in jax.tree.leaves_with_path(held)
    }


def _shared_axes(parameters):
    """How many leading axes all have, with the same sizes."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(parameters)]
    sizes = [len(set(axis)) == 1 for axis in zip(*shapes, strict=False)]
    return (*sizes, False).index(False)


def _exchange(node, made, seen):
    """``node``, changed in place, or what is made to stand in its place."""
    if id(node) in made:
        return made[id(node)]
    if id(node) in seen:
        return node
    seen.add(id(node))
    children = dict(_children(node))
    new = {name: _exchange(child, made, seen) for name, child in children.items()}
    changed = {name: new[name] for name in new if new[name] is not children[name]}
    if isinstance(node, tuple) and changed:
        # A named tuple takes them one by one.
        items = (*new.values(),)
        return items if type(node) is tuple else type(node)(*items)
    is_plain = isinstance(node, (list, dict))
    put: Any = node.__setitem__ if is_plain else functools.partial(setattr, node)
    for name, child in changed.items():
        put(name, child if is_plain else nnx.data(child))
    return node


def _children(node):
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    if isinstance(node, dict):
        return node.items()
    if not isinstance(node, nnx.Pytree):
        return ()
    names = [name for name in vars(node) if not name.startswith("_pytree__")]
    return [(name, vars(node)[name]) for name in names]


def _dotted(path):
    return ".".join(map(str, path))
