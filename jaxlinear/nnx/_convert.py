"""A Flax model with our layers instead of Flax's, and the way back."""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxlinear._checks import ARRAYS
from jaxlinear._flax.layout import (
    AxisCounts,
    axis_counts,
    kernel_to_weight,
    weight_to_kernel,
)
from jaxlinear._flax.trees import dotted, with_kernels, with_weights
from jaxlinear._product import Product, Products
from jaxlinear._product_checks import checked_products
from jaxlinear.nnx._module import Linear
from jaxlinear.nnx._optimizer import exchanged_state


class Report(NamedTuple):
    """What :func:`convert` or :func:`revert` did; ``print`` shows it.

    Attributes:
      converted: the path of each layer that was replaced, with how many input and
        output axes its kernel has, as ``jaxlinear.nnx.convert_tree`` takes them.
      left_alone: the path of each linear layer that was not replaced, and why.
      lost: the path of each replaced layer that lost a setting, and which. Only
        :func:`revert` can lose one: ``products``.
    """

    converted: dict[str, AxisCounts]
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
            # The layers of a list are one line.
            alike = Counter(re.sub(r"\b\d+\b", "*", entry) for entry in entries)
            lines += [f"{title} ({len(entries)}):"] if entries else []
            lines += [
                f"  {entry} ({n})" if n > 1 else f"  {entry}"
                for entry, n in alike.items()
            ]
        return "\n".join(lines) or "no linear layers"


def convert(model: nnx.Module, optimizer: nnx.Optimizer[Any] | None = None) -> Report:
    """Replace Flax's linear layers in ``model`` by ours.

    Each ``nnx.Linear`` and ``nnx.LinearGeneral`` is replaced in place, also those in an
    ``nnx.MultiHeadAttention``. The kernel becomes the weight, equal to the bit, with
    its sharding, its metadata and its type of variable. The bias is the same variable.
    ``dtype``, ``param_dtype``, ``precision`` and ``preferred_element_type`` mean what
    they did. Shared layers stay shared, stacked ones stacked. The output is Flax's
    within rounding: the terms of a product may be added in another order, and a
    low-precision result is rounded once.

    Layers that compute their product in another way are left alone and reported:
    subclasses, such as ``nnx.LoRALinear``; layers inside ``nnx.LoRA``,
    ``nnx.WeightNorm`` or ``nnx.SpectralNorm``, which look for a kernel; layers with a
    ``dot_general``, a ``promote_dtype`` or a ``batch_axis``; ``nnx.Einsum``; and layers
    whose kernel something else also reads.

    Args:
      model: a model. A single layer is an error, since nothing holds it: put it into an
        ``nnx.Sequential``.
      optimizer: the optimizer of this model, whose state is converted as well. Its
        ``tx`` is not changed: a mask must find both ``kernel`` and ``weight``, and Muon
        needs ``dimension_numbers``. An optimizer of another model is an error if its
        paths or shapes differ; if they are equal, nothing tells it apart. To convert a
        plain Optax state use ``convert_tree(state, report.converted)``.

    Returns:
      The report. An error changes neither the model nor the optimizer.

    Raises:
      TypeError: if ``model`` is not a module or is itself a layer, or ``optimizer`` is
        not an ``nnx.Optimizer``.
      ValueError: if the optimizer's state does not belong to this model, has other axes
        than the parameters (Adafactor, GaLore, ``optax.flatten``), or would not be one
        of ``optimizer.tx`` for the converted model.

    Example:
      >>> from flax import nnx
      >>> import jaxlinear.nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> print(jaxlinear.nnx.convert(model))
      converted (1):
        layers.*
    """
    return _exchange(model, optimizer, _TO_OURS)


def revert(model: nnx.Module, optimizer: nnx.Optimizer[Any] | None = None) -> Report:
    """Replace our layers in ``model`` by Flax's: the inverse of :func:`convert`.

    The parameters are equal to the bit. A layer with numbers of features and the last
    axis becomes an ``nnx.Linear``, any other an ``nnx.LinearGeneral``. ``products``
    that Flax's layers have no argument for are lost, and reported.

    Args:
      model: a model with layers of ours. Subclasses and layers inside ``nnx.LoRA``,
        ``nnx.WeightNorm`` or ``nnx.SpectralNorm`` are left alone.
      optimizer: as in :func:`convert`. For a plain Optax state there is
        ``revert_tree(state, report.converted)``.

    Returns:
      The report. An error changes neither the model nor the optimizer.

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
    return _exchange(model, optimizer, _TO_FLAX)


def layers_of(
    model: nnx.Module, kinds: type | tuple[type, ...] = Linear
) -> dict[str, AxisCounts]:
    """The linear layers in ``model``, by path, with their numbers of axes.

    ``convert_tree``, ``revert_tree`` and ``dimension_numbers`` take the result as their
    ``layers``. A model that was written with our layer has no report to take them from.

    Args:
      model: a model.
      kinds: the layers to look for. Default: ours, and its subclasses. ``nnx.Linear``
        and ``nnx.LinearGeneral`` are also possible.

    Returns:
      A dict from dotted paths to how many input and output axes a weight has.

    Raises:
      TypeError: if ``model`` is not a module.

    Example:
      >>> from flax import nnx
      >>> import jaxlinear.nnx
      >>> layer = jaxlinear.nnx.Linear(8, (2, 4), rngs=nnx.Rngs(0))
      >>> jaxlinear.nnx.layers_of(nnx.Sequential(layer, nnx.relu))
      {'layers.0': AxisCounts(inputs=1, outputs=2)}
    """
    _check_module(model)
    return {
        dotted(path): axis_counts(node.in_features, node.out_features)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, kinds)
    }


# What Flax does not document.

_PROMOTE_DTYPE = (
    inspect.signature(nnx.Linear.__init__).parameters["promote_dtype"].default
)


def _attributes(node):
    """The attributes of a module, without Flax's own."""
    names = [name for name in vars(node) if not name.startswith("_pytree__")]
    return {name: vars(node)[name] for name in names}


# Which layers are exchanged.


# They look for a parameter of the layer inside them.
_WRAPPERS = nnx.LoRA, nnx.WeightNorm, nnx.SpectralNorm


class _Plan(NamedTuple):
    """The layers to exchange, with their axes, and why others are left alone."""

    layers: dict[str, tuple[Any, AxisCounts]]
    left_alone: dict[str, str]


def _plan(model, direction):
    _check_module(model)
    if isinstance(model, direction.kinds):
        raise TypeError(
            "`model` must be what holds the layers, got one that nothing holds, a"
            f" {type(model).__name__}: put it into an nnx.Sequential"
        )
    nodes = dict(nnx.iter_graph(model))  # Each node once.
    wrapper_of = _wrappers(nodes.values())
    candidates, left_alone = {}, {}
    for path, node in nodes.items():
        if isinstance(node, direction.kinds):
            wrapper = wrapper_of.get(id(node))
            why = f"it is inside {wrapper}" if wrapper else direction.why_not(node)
            if why:
                left_alone[dotted(path)] = why
            else:
                candidates[dotted(path)] = node
    name, layers = direction.parameter, {}
    read_at = _read_at(nodes, candidates.values())
    for path, layer in candidates.items():
        variable = getattr(layer, name)
        if id(variable) in read_at:
            left_alone[path] = f"its {name} is also {read_at[id(variable)]}"
        elif not isinstance(variable.get_value(), ARRAYS):
            left_alone[path] = f"its {name} is not an array"
        else:
            layers[path] = layer, axis_counts(layer.in_features, layer.out_features)
    return _Plan(layers, dict(sorted(left_alone.items())))


def _check_module(model):
    if not isinstance(model, nnx.Module):
        got = type(model).__name__
        raise TypeError(f"`model` must be a flax.nnx.Module, got {got}")


def _wrappers(nodes):
    """The name of the wrapper around each node that is inside one, by its id."""
    wrapper_of = {}
    for node in nodes:
        if isinstance(node, _WRAPPERS):
            for _, inner in nnx.iter_graph(node):
                wrapper_of[id(inner)] = type(node).__name__
    return wrapper_of


def _read_at(nodes, layers):
    """Where the model holds an object, by its id, except inside these layers."""
    ids = {id(layer) for layer in layers}
    read_at = {}
    for path, node in nodes.items():
        if id(node) not in ids:
            for name, child in _children(node):
                read_at[id(child)] = dotted((*path, name))
    return read_at


def _why_not_ours(layer):
    """Why a layer of Flax is left alone, or None."""
    kind = type(layer)
    if kind is nnx.Einsum:
        return "it is an Einsum"
    if kind not in (nnx.Linear, nnx.LinearGeneral):
        return f"{kind.__name__} is a subclass"
    if layer.dot_general not in (None, lax.dot_general):
        return "it has a dot_general"
    if layer.promote_dtype is not _PROMOTE_DTYPE:
        return "it has a promote_dtype"
    if kind is nnx.LinearGeneral and layer.dot_general_cls is not None:
        return "it has a dot_general_cls"
    if kind is nnx.LinearGeneral and layer.batch_axis:
        return "it has a batch_axis"
    for name in "dtype", "param_dtype":
        dtype = getattr(layer, name)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            return f"its {name} is not a floating dtype"
    known = {*inspect.signature(kind.__init__).parameters, "kernel", "bias"}
    if unknown := _attributes(layer).keys() - known:
        return f"it has an attribute of its own: {', '.join(sorted(unknown))}"
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
        return "its preferred_element_type is not wider than its dtype"
    return None


def _why_not_flax(layer):
    """Why a layer of ours is left alone, or None."""
    return None if type(layer) is Linear else f"{type(layer).__name__} is a subclass"


# The layers themselves. They are made without values, and given their variables.


def _without_values(kind: Any, layer, **options):
    """A layer of this kind, with the settings that both kinds have from ``layer``."""
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
    """Our layer instead of Flax's, and what it loses: nothing."""
    dtype, products = _dtype_and_products(layer.dtype, layer.preferred_element_type)
    axis = getattr(layer, "axis", -1)
    ours = _without_values(Linear, layer, axis=axis, dtype=dtype, products=products)
    ours.weight, ours.bias = weights[id(layer.kernel)], layer.bias
    return ours, None


def _flax(layer, kernels):
    """Flax's layer instead of ours, and what it loses: ``"products"``, or None."""
    dtype, preferred = layer.dtype, None
    operand = layer.products.forward.dtype
    if operand is not None and not isinstance(operand, tuple):
        dtype, preferred = operand, layer.dtype
    # Would that layer be converted to this one?
    converted, products = _dtype_and_products(dtype, preferred)
    products = checked_products(products, None, converted)
    lost = None
    if (converted, products) != (layer.dtype, layer.products):
        dtype, preferred, lost = layer.dtype, None, "products"
    kind, options = nnx.Linear, {"dtype": dtype, "preferred_element_type": preferred}
    if isinstance(layer.in_features, tuple) or layer.axis != -1:
        kind, options = nnx.LinearGeneral, options | {"axis": layer.axis}
    flax = _without_values(kind, layer, **options)
    flax.kernel, flax.bias = kernels[id(layer.weight)], layer.bias
    return flax, lost


def _dtype_and_products(dtype, preferred):
    """Our layer's, for a ``dtype`` and ``preferred_element_type`` of Flax's.

    Y is in the preferred dtype, the operands of all three products in ``dtype``.
    """
    if dtype is None or preferred is None or jnp.dtype(preferred) == jnp.dtype(dtype):
        return dtype, None
    product = Product(dtype=dtype)
    return preferred, Products(product, product, product)


# The model.


class _Direction(NamedTuple):
    """From Flax's layers to ours, or back.

    Attributes:
      kinds: the old layers.
      parameter: the name of their kernel or weight.
      why_not: says why a layer is left alone, or None.
      swap: makes the new kernel or weight from the old one.
      new_layer: makes the new layer from the old one and all new kernels or weights, by
        the ids of the old ones. It also returns what is lost, or None.
      convert_tree: does the same in a tree.
    """

    kinds: tuple[type, ...]
    parameter: str
    why_not: Callable[..., str | None]
    swap: Callable[..., Any]
    new_layer: Callable[..., tuple[Any, str | None]]
    convert_tree: Callable[..., Any]


_FLAX = nnx.Linear, nnx.LinearGeneral, nnx.Einsum
_TO_OURS = _Direction(
    _FLAX, "kernel", _why_not_ours, kernel_to_weight, _ours, with_weights
)
_TO_FLAX = _Direction(
    (Linear,), "weight", _why_not_flax, weight_to_kernel, _flax, with_kernels
)


def _exchange(model, optimizer, direction):
    plan = _plan(model, direction)
    variables = {}
    for layer, counts in plan.layers.values():
        old = getattr(layer, direction.parameter)
        if id(old) not in variables:  # A shared one stays shared.
            variables[id(old)] = direction.swap(old, counts)
    new_layers, lost = {}, {}
    for path, (layer, _) in plan.layers.items():
        new_layers[id(layer)], loss = direction.new_layer(layer, variables)
        if loss:
            lost[path] = loss
    converted = {path: counts for path, (_, counts) in plan.layers.items()}
    if optimizer is not None:
        state = exchanged_state(model, optimizer, converted, direction.convert_tree)
        optimizer.opt_state = nnx.data(state)
    _replaced(model, new_layers, set())
    return Report(converted, plan.left_alone, lost)


def _replaced(node, new_layers, seen):
    """``node`` with its layers replaced in place, or the new layer if it is one."""
    if id(node) in new_layers:
        return new_layers[id(node)]
    if id(node) in seen:
        return node
    seen.add(id(node))
    children = dict(_children(node))
    new = {name: _replaced(child, new_layers, seen) for name, child in children.items()}
    changed = {name: new[name] for name in new if new[name] is not children[name]}
    if isinstance(node, tuple) and changed:
        # A named tuple is made from its items, one by one.
        return tuple(new.values()) if type(node) is tuple else type(node)(*new.values())
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
    return _attributes(node).items()
