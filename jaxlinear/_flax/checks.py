"""The arguments of both modules: what is taken, and what is an error."""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxlinear._checks import checked_dtype, checked_optional_dtype
from jaxlinear._product_checks import checked_precision, checked_products

Placement = jax.Device | Sharding
"""Where parameters are created: on one device, or split over several."""

Integers = SupportsIndex | Sequence[SupportsIndex]
"""An integer, NumPy's included, or one for each axis."""


def as_tuple(value: Any) -> Any:
    """An integer as a tuple of one, a tuple as it is."""
    return value if isinstance(value, tuple) else (value,)


def keep_checked(
    module: Any,
    *,
    axis,
    dtype,
    param_dtype,
    precision,
    products,
    kernel_init,
    bias_init,
    device,
    **features,
):
    """Check the arguments that both modules have, and set those that both keep.

    They are kept as they were checked, a list as a tuple: modules have a hash. The last
    three are only checked.
    """
    for name, value in features.items():
        setattr(module, name, _checked_features(name, value))
    module.axis = _checked_axis(axis)
    module.dtype = checked_optional_dtype("dtype", dtype)
    module.param_dtype = _checked_param_dtype(param_dtype)
    module.precision = checked_precision("precision", precision)
    module.products = checked_products(products, None, module.dtype)
    _check_initializer("kernel_init", kernel_init)
    _check_initializer("bias_init", bias_init)
    if device is not None and not isinstance(device, jax.Device | Sharding):
        raise TypeError(
            f"`device` must be a jax.Device or a jax.sharding.Sharding, got {device!r}"
        )


def _checked_features(name: str, features: Any) -> Any:
    """A number of features that is not negative, or a tuple of one for each axis."""
    if not isinstance(features, (tuple, list)):
        return _checked_count(name, features)
    if not features:
        raise ValueError(f"`{name}` must have a number for one axis at least, got ()")
    return tuple(_checked_count(name, count) for count in features)


def _checked_count(name, count):
    checked = _checked_integer(name, count)
    if checked < 0:
        raise ValueError(f"`{name}` must not be negative, got {checked}")
    return checked


def _checked_integer(name, value):
    required = f"`{name}` must be an integer"
    if isinstance(value, jax.Array):  # It has no hash, and may be traced.
        raise TypeError(f"{required}, got a JAX array")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{required}, got {value!r}") from None


def _checked_axis(axis: Any) -> Any:
    """The axis of the input that is contracted, or a tuple of several."""
    if not isinstance(axis, (tuple, list)):
        return _checked_integer("axis", axis)
    return tuple(_checked_integer("axis", one) for one in axis)


def _checked_param_dtype(param_dtype):
    """A dtype in which parameters can be drawn: with a sign and at least 8 bits."""
    checked = checked_dtype("param_dtype", param_dtype, bits=0)
    limits = jnp.finfo(checked)
    if limits.bits < 8 or not limits.min < 0:
        raise TypeError(
            "`param_dtype` must have a sign and at least 8 bits, else most parameters"
            f" would be drawn as zeros, got {checked}"
        )
    return checked


def _check_initializer(name, init):
    """Refuse what cannot be called as ``init(key, shape, dtype)``."""
    if init is None:
        return
    required = f"`{name}` must be a function init(key, shape, dtype)"
    if not callable(init):
        raise TypeError(f"{required}, got {init!r}")
    try:
        inspect.signature(init).bind("key", "shape", "dtype")
    except TypeError as error:
        raise TypeError(
            f"{required}, got {init!r}: {error}. If it makes initializers, call it"
        ) from None
    except ValueError:  # No signature: a built-in function.
        return


def check_is_matrix(axis, **features):
    """Refuse a loss of a layer with several axes: the last has the classes."""
    for name, value in features.items():
        if len(as_tuple(value)) != 1:
            raise ValueError(f"`{name}` must be one number in a loss, got {value}")
    if as_tuple(axis) != (-1,):
        raise ValueError(f"`axis` must be -1 in a loss, got {axis}")


def refuse_kernel(layer, name):
    """Refuse Flax's name of the weight, unless a subclass has an attribute of it."""
    if name == "kernel" and getattr(type(layer), name, None) is None:
        raise AttributeError(
            f"{type(layer).__name__!r} object has no attribute 'kernel': it has a"
            " `weight` (out, in), which is Flax's kernel (in, out) transposed"
        )


_INSTEAD_OF = {
    "dot_general": "`products` says how each product is computed; a library that"
    " replaces `jax.lax.dot_general` finds it inside `jaxlinear.plain_autodiff()`",
    "dot_general_cls": "as for `dot_general`",
    "promote_dtype": "`dtype` and `products` say to what the operands are cast",
    "batch_axis": "map the layer with `nnx.vmap` or `jax.vmap`",
    "batch_dims": "map the layer with `nn.vmap` or `jax.vmap`",
    "preferred_element_type": "say it of a product, as in"
    " `products=Products(forward=Product(preferred_element_type=...))`",
}


def refuse_others(arguments):
    """Refuse arguments that our modules do not have, and say what to use instead.

    None and an empty container are Flax's defaults: they ask for nothing.
    """
    for name, value in arguments.items():
        if name not in _INSTEAD_OF:
            raise TypeError(f"unexpected argument `{name}`")
        is_empty = isinstance(value, (tuple, list, Mapping)) and not value
        if value is not None and not is_empty:
            message = f"unexpected argument `{name}`: {_INSTEAD_OF[name]}"
            raise TypeError(message)
