"""Refusals of bad arguments, each naming the argument, what is required and what came.

What JAX refuses clearly by itself is left to JAX.
"""

import operator

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from jaxlinear._types import accumulator

Placement = jax.Device | Sharding
"""Where parameters are created: on one device, or split over several."""


def checked_array(name, value):
    """``value`` as a JAX array, a Flax ``Param`` included."""
    if value is None or isinstance(value, (list, tuple, dict, set)):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}")
    return jnp.asarray(value)


def check_input(x):
    if x.ndim == 0:
        raise ValueError("`x` must have at least one axis, (*, in), got a scalar")


def check_shapes(x, weight, bias):
    check_input(x)
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` must be a matrix (out, in), got shape {weight.shape}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`x` must have {weight.shape[1]} elements along its last axis, as `weight`"
            f" of shape {weight.shape} does, got shape {x.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` must have shape {weight.shape[:1]}, one element for each row of"
            f" `weight`, got shape {bias.shape}"
        )


def checked_dtype(name, dtype):
    """``dtype`` as a floating or complex NumPy dtype."""
    required = f"`{name}` must be a floating or complex dtype"
    if dtype is None:  # Which NumPy takes for float64.
        raise TypeError(f"{required}, got None")
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{required}, got {dtype!r}") from None
    if not jnp.issubdtype(checked, jnp.inexact):
        raise TypeError(f"{required}, got {checked}")
    return checked


def checked_optional_dtype(name, dtype):
    return None if dtype is None else checked_dtype(name, dtype)


def compute_dtype(dtype, *arrays):
    """``dtype``, or by default that of the arrays, promoted to a floating one."""
    arrays = [array for array in arrays if array is not None]
    if dtype is None:
        return jnp.result_type(*arrays, float)
    dtype = checked_dtype("dtype", dtype)
    if jnp.issubdtype(dtype, jnp.floating) and any(map(jnp.iscomplexobj, arrays)):
        raise TypeError(f"`dtype` must be complex for complex arguments, got {dtype}")
    return dtype


ALTERNATIVE_FLOAT16 = "alternative_float16"


def checked_backward_dtype(backward_dtype, dtype):
    """The dtype of the backward products, and whether it is the alternative float16.

    ``dtype`` is that of the forward product, or None where it is not known yet.
    """
    if backward_dtype is None:
        return dtype, False
    if isinstance(backward_dtype, str) and backward_dtype == ALTERNATIVE_FLOAT16:
        return jnp.dtype("float16"), True
    checked = checked_dtype("backward_dtype", backward_dtype)
    if dtype is not None and _is_complex(checked) != _is_complex(dtype):
        kind = "complex" if _is_complex(dtype) else "floating"
        raise TypeError(f"`backward_dtype` must be {kind} as {dtype} is, got {checked}")
    return checked, False


def _is_complex(dtype):
    return jnp.issubdtype(dtype, jnp.complexfloating)


def checked_reduce_dtype(reduce_dtype, *operand_dtypes):
    """``reduce_dtype`` as a NumPy dtype, or None for None."""
    if reduce_dtype is None:
        return None
    checked = checked_dtype("reduce_dtype", reduce_dtype)
    own = [*operand_dtypes, *map(accumulator, operand_dtypes)]
    if checked not in own:
        allowed = " or ".join(dict.fromkeys(map(str, own)))
        raise TypeError(f"`reduce_dtype` must be {allowed}, got {checked}")
    return checked


def checked_features(name, count):
    """``count`` as a Python integer that is not negative."""
    try:
        checked = operator.index(count)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {count!r}") from None
    if checked < 0:
        raise ValueError(f"`{name}` must not be negative, got {checked}")
    return checked


def checked_sharding(name, device):
    """The sharding that places an array on ``device``, or None for None."""
    if device is None or isinstance(device, Sharding):
        return device
    if isinstance(device, jax.Device):
        return SingleDeviceSharding(device)
    raise TypeError(
        f"`{name}` must be a jax.Device or a jax.sharding.Sharding, got {device!r}"
    )
