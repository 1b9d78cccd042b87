"""The arguments of the loss of a linear layer: each error names one."""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlinear._checks import (
    check_input,
    check_shapes,
    checked_array,
    checked_optional_dtype,
)
from jaxlinear._product import Products
from jaxlinear._product_checks import checked_products


class Options(NamedTuple):
    """The options that are not arrays, checked. They have a hash."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    dtype: Any
    products: Products
    axes: tuple[str, ...]


def checked_loss(
    h,
    weight,
    labels,
    bias,
    weights,
    *,
    reduction="none",
    ignore_index=-1,
    label_smoothing=0.0,
    z_loss=0.0,
    soft_cap,
    dtype,
    precision,
    products,
    axis_name,
):
    """The arrays that are not None, by their names, and the options."""
    given = {"h": h, "weight": weight, "labels": labels}
    given |= {} if bias is None else {"bias": bias}
    given |= {} if weights is None else {"weights": weights}
    arrays = {name: checked_array(name, array) for name, array in given.items()}
    if reduction not in _REDUCTIONS:
        known = ", ".join(map(repr, _REDUCTIONS))
        raise ValueError(f"`reduction` must be one of {known}, got {reduction!r}")
    check_input(arrays["h"], "h")
    _check_labels(arrays["h"], arrays["labels"])
    if "weights" in arrays:
        _check_weights(arrays["weights"], arrays["labels"])
    dtype = checked_optional_dtype("dtype", dtype)
    products = checked_products(products, precision, dtype)
    for field, product in zip(Products._fields, products, strict=True):
        _check_product(f"products.{field}", product)
    return arrays, Options(
        reduction=reduction,
        ignore_index=_checked_index(ignore_index),
        label_smoothing=_checked_number("label_smoothing", label_smoothing, 0, 1),
        z_loss=_checked_number("z_loss", z_loss, 0, math.inf),
        soft_cap=None if soft_cap is None else _checked_soft_cap(soft_cap),
        dtype=dtype,
        products=products,
        axes=_checked_axes(axis_name, arrays["weight"]),
    )


_REDUCTIONS = "mean", "sum", "none"


def _check_labels(h, labels):
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        advice = (
            ": probabilities of the classes are not supported"
            if labels.ndim == h.ndim and jnp.issubdtype(labels.dtype, jnp.floating)
            else ""
        )
        raise TypeError(f"`labels` must be integers, got {labels.dtype}{advice}")
    if labels.shape != h.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {h.shape[:-1]}, one for each row of `h`, got"
            f" shape {labels.shape}"
        )


def _check_weights(weights, labels):
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in kinds):
        raise TypeError(f"`weights` must be real numbers, got {weights.dtype}")
    if weights.shape != labels.shape:
        raise ValueError(
            f"`weights` must have shape {labels.shape}, one for each of `labels`, got"
            f" shape {weights.shape}"
        )
    # Their values are not known where they are traced, or in another process.
    is_known = not isinstance(weights, Tracer) and weights.is_fully_addressable
    if is_known and weights.size:
        least = np.asarray(weights).astype(np.float64).min()
        if least < 0:
            raise ValueError(f"`weights` must be 0 or more, got {least}")


def _check_product(name, product):
    if product.is_scaled:
        raise ValueError(
            f"`{name}.dtype` must have 16 bits or more in a loss, got"
            f" {product.dtype[0]}"
        )
    if product.preferred_element_type is not None:
        raise ValueError(
            f"`{name}.preferred_element_type` must be None in a loss, whose logits and"
            f" sums are not rounded, got {product.preferred_element_type}"
        )


def _checked_index(value):
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"`ignore_index` must be an integer, got {_text(value)}"
        ) from None


def _checked_number(name, value, least, most):
    required = f"`{name}` must be a number"
    if most == math.inf:
        required += f" of {least} or more"
    else:
        required += f" from {least} to {most}"
    is_text = isinstance(value, (str, bytes))  # `float` reads "0.1".
    if isinstance(value, Tracer) or is_text or not np.isscalar(np.asarray(value)[()]):
        raise TypeError(f"{required}, known when it is traced, got {_text(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{required}, got {_text(value)}") from None
    if not least <= number <= most or number == math.inf:
        raise ValueError(f"{required}, got {value!r}")
    return number


def _checked_soft_cap(value):
    number = _checked_number("soft_cap", value, 0, math.inf)
    if number == 0:
        raise ValueError(f"`soft_cap` must be greater than 0, or None, got {value!r}")
    return number


def _checked_axes(value, weight):
    names = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "`axis_name` must be the name of an axis of `jax.shard_map`, a tuple of"
            f" names, or None, got {_text(value)}"
        )
    if len({*names}) < len(names):  # XLA would end the process.
        raise ValueError(f"`axis_name` must name each axis once, got {names}")
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                "`axis_name` must be an axis of the `jax.shard_map` around the call,"
                f" got {name!r}"
            ) from None
    # Otherwise JAX differentiates a sum over devices by another rule than the loss.
    missing = {*names} - jax.typeof(weight).manual_axis_type.varying
    if missing:
        raise ValueError(
            "`axis_name` must be an axis over which a `jax.shard_map` with"
            f" `check_vma=True` splits `weight`, got {min(missing)!r}"
        )
    return names


def _text(value):
    return f"{type(value).__name__} {value!r:.60}"


def check_tokens(h, weight, bias):
    """Refuse arrays that do not go together; their dtypes and shapes are enough."""
    check_shapes(h, weight, bias, name="h")
    if weight.shape[0] == 0:
        raise ValueError(
            f"`weight` must have at least one class, got shape {weight.shape}"
        )
    for name, array in {"h": h, "weight": weight, "bias": bias}.items():
        if array is not None and jnp.iscomplexobj(array):
            raise TypeError(f"`{name}` must be real, got {array.dtype}")


def check_is_real(dtype):
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"`dtype` must be floating, got {dtype}")
