"""The arrays, shapes and dtypes of ``linear()``: what is taken, and what is an error.

An error names the argument, what is required, and what came. What JAX refuses clearly
by itself is left to JAX.
"""

import difflib
import functools
import sys
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.typing
import numpy as np

# Arrays.


@runtime_checkable
class SupportsArray(Protocol):
    """What JAX can make an array of, such as a variable of NNX."""

    def __jax_array__(self) -> jax.Array: ...


ArrayLike = jax.typing.ArrayLike | SupportsArray

ARRAYS = jax.Array, np.ndarray, jax.ShapeDtypeStruct
"""The kinds of an array in a tree, with values or without."""


def checked_arrays(x, weight, bias):
    """The arguments as JAX arrays: whatever ``jnp.asarray`` takes except containers."""
    # Before `jax.jit`, which takes fewer kinds.
    x, weight = checked_array("x", x), checked_array("weight", weight)
    return x, weight, None if bias is None else checked_array("bias", bias)


def checked_array(name, value):
    if isinstance(value, jax.Array):  # As it is: a copy would be one more residual.
        return value
    if value is None or isinstance(value, (str, list, tuple, dict, set)):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}")
    try:
        return jnp.asarray(value)
    except Exception as error:
        got = f"{type(value).__name__}{_advice_for(value)}"
        raise TypeError(f"`{name}` must be an array, got {got}") from error


def _advice_for(value):
    """What to do with an array that JAX does not accept."""
    from jax.experimental.sparse import JAXSparse

    if isinstance(value, JAXSparse):
        return ", which is sparse: pass its `todense()`"
    flax = sys.modules.get("flax.core.meta")
    if flax and isinstance(value, flax.AxisMetadata):
        return ", which is a box: pass what `flax.linen.unbox` takes out of it"
    return ""


def check_shapes(x, weight, bias, name="x"):
    """``name`` is that of the argument ``x``."""
    for its_name, array in {name: x, "weight": weight, "bias": bias}.items():
        if array is not None and jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(f"`{its_name}` must hold numbers, got dtype {array.dtype}")
    check_input(x, name)
    if weight.ndim != 2:
        raise ValueError(
            f"`weight` must be a matrix (out, in), got shape {weight.shape}"
        )
    if x.shape[-1] != weight.shape[1]:
        bias_fits = bias is None or bias.shape == weight.shape[1:]
        if x.shape[-1] == weight.shape[0] and bias_fits:
            raise ValueError(
                f"`weight` must be (out, in), with the {x.shape[-1]} elements of `{name}`"
                f" along its last axis, got shape {weight.shape}. Did you mean"
                " `weight.T`?"
            )
        raise ValueError(
            f"`{name}` must have {weight.shape[1]} elements along its last axis, as `weight`"
            f" of shape {weight.shape} does, got shape {x.shape}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` must have shape {weight.shape[:1]}, one element for each row of"
            f" `weight`, got shape {bias.shape}"
        )


def check_input(x, name="x"):
    if x.ndim == 0:
        raise ValueError(f"`{name}` must have at least one axis, (*, in), got a scalar")


# Dtypes.


def checked_dtype(name, dtype, bits=16, also=""):
    """``dtype`` as a floating or complex NumPy dtype of at least ``bits``.

    ``also`` names another one for the message. Whether it is that one, the caller has
    checked.
    """
    # NumPy takes None for float64, and an array for its dtype.
    if not isinstance(dtype, (str, np.dtype, type)):
        known = str(dtype).rpartition(".")[2]  # "bfloat16" of torch.bfloat16.
        advice = f". Did you mean {known!r}?" if known in DTYPES else ""
        raise TypeError(
            f"`{name}` must be a floating or complex dtype{also}, got {dtype!r}{advice}"
        )
    return _checked_dtype(name, dtype, bits, also)


@functools.cache  # It takes a tenth of the time of a call of `linear`.
def _checked_dtype(name, dtype, bits, also):
    required = f"`{name}` must be a floating or complex dtype{also}"
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        got = f"{dtype!r}{_similar_dtype(dtype, bits)}"
        raise TypeError(f"{required}, got {got}") from None
    if not jnp.issubdtype(checked, jnp.inexact):
        is_meant = bits > 8 and checked == "int8"
        advice = _similar_dtype(checked, bits) if is_meant else ""
        raise TypeError(f"{required}, got {checked}{advice}")
    its_bits = jnp.finfo(checked).bits
    if its_bits > 64:  # NumPy's "f16" has 16 bytes.
        got = f"{dtype!r}{_similar_dtype(dtype, bits)}"
        raise TypeError(f"{required} of JAX's, got {got}")
    if its_bits < bits:  # Unscaled, large values would become NaN.
        got = f"{checked}{_similar_dtype(checked, bits)}"
        raise TypeError(f"{required} of at least {bits} bits, got {got}")
    return checked


DTYPES = ["bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
RECIPE_OF = {"float8_e4m3fn": "FLOAT8", "float8_e5m2": "FLOAT8", "int8": "INT8"}
"""The recipe for a dtype of 8 bits."""
_SHORT_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "f8": "float8_e4m3fn"}
_SHORT_DTYPES |= {f"f{bits}": f"float{bits}" for bits in (16, 32, 64)}
_SHORT_DTYPES |= {f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)}


def meant_dtype(dtype):
    """The name of the dtype that a user may have meant, or None."""
    name = str(dtype).lower()
    known = [*DTYPES, *RECIPE_OF]
    close = difflib.get_close_matches(_SHORT_DTYPES.get(name, name), known)
    return close[0] if close else None


def _similar_dtype(dtype, bits):
    """A question: was another dtype meant, or a recipe of 8 bits?"""
    meant = meant_dtype(dtype)
    if meant is None:
        return ""
    if meant in RECIPE_OF and bits > 8:  # The dtype of a layer.
        return f". Did you mean `products=jaxlinear.{RECIPE_OF[meant]}`?"
    return f". Did you mean {meant!r}?"


def checked_optional_dtype(name, dtype):
    return None if dtype is None else checked_dtype(name, dtype)


def compute_dtype(dtype, *arrays):
    """``dtype``, or by default the dtype to which JAX promotes the arrays."""
    arrays = [array for array in arrays if array is not None]
    if dtype is None:
        return jnp.result_type(*arrays)
    if jnp.issubdtype(dtype, jnp.floating) and any(map(jnp.iscomplexobj, arrays)):
        raise TypeError(f"`dtype` must be complex for complex arguments, got {dtype}")
    return dtype
