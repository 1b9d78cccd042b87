"""The precision of each of the three products."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import concrete_or_error
from jax.sharding import SingleDeviceSharding


class Precision(NamedTuple):
    """A precision for each product of a linear layer.

    Each is what :func:`jax.lax.dot_general` takes: a ``jax.lax.Precision``, a
    ``jax.lax.DotAlgorithmPreset``, the name of either, or None for the default. The
    derivatives of a product have its precision.

    Example:
      >>> import jax.numpy as jnp, jaxlinear
      >>> precision = jaxlinear.Precision("tensorfloat32", weight_grad="highest")
      >>> jaxlinear.linear(jnp.ones(3), jnp.ones((2, 3)), precision=precision)
      Array([3., 3.], dtype=float32)
    """

    forward: lax.PrecisionLike = None
    input_grad: lax.PrecisionLike = None
    weight_grad: lax.PrecisionLike = None


def is_algorithm(precision):
    return isinstance(precision, lax.DotAlgorithmPreset | lax.DotAlgorithm)


def checked_precision(precision):
    """``precision`` as a ``Precision`` without names."""
    if not isinstance(precision, Precision):
        precision = Precision(precision, precision, precision)
    return Precision(*map(_without_names, precision))


def _without_names(precision):
    if precision is None:  # The backward pass may be traced under another default.
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if type(precision) in (list, tuple) and len(precision) == 2:
        return tuple(map(_without_names, precision))
    if isinstance(precision, str):
        precision = _NAMED.get(precision, precision)
    if precision is lax.DotAlgorithmPreset.DEFAULT:
        precision = lax.Precision.DEFAULT
    is_known = precision is None or isinstance(precision, lax.Precision)
    if is_known or is_algorithm(precision):
        return precision
    raise ValueError(
        "`precision` must be None, a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, a"
        f" jax.lax.DotAlgorithm, one of the names {', '.join(_NAMED)}, two of these for"
        " the two operands, or a jaxlinear.Precision of three for the three products,"
        f" got {precision!r}"
    )


# The names that JAX knows: of each `jax.lax.Precision` several.
_NAMES = "default fastest bfloat16 high bfloat16_3x tensorfloat32 highest float32"
_NAMED = {name: lax.Precision(name) for name in _NAMES.split()}
_NAMED |= lax.DotAlgorithmPreset.__members__


def check_support(precision, *arrays):
    """Refuse algorithms that the device does not have, where the arrays are on one.

    Inside a program that is being traced the device is not known: there JAX refuses
    them, when it lowers the program.
    """
    algorithms = [p for p in checked_precision(precision) if is_algorithm(p)]
    if not algorithms:  # Every device has each jax.lax.Precision.
        return
    try:
        array, *_ = (concrete_or_error(None, jnp.asarray(a)) for a in arrays)
    except jax.errors.ConcretizationTypeError:
        return
    device, dtype = min(array.devices(), key=lambda d: d.id), array.dtype
    for algorithm in algorithms:
        if not _has_algorithm(device, algorithm, dtype):
            supported = [
                name
                for name, p in _NAMED.items()
                if not is_algorithm(p) or _has_algorithm(device, p, dtype)
            ]
            raise ValueError(
                f"`precision` must be one of {', '.join(supported)} for {dtype} on"
                f" {device.device_kind}, got {algorithm}"
            )


@functools.cache
def _has_algorithm(device, algorithm, dtype):
    """Whether the device's compiler takes a product with it: nothing lists them."""

    def product(a, b):
        return lax.dot(a, b, precision=algorithm)

    on_device = SingleDeviceSharding(device)
    operand = jax.ShapeDtypeStruct((8, 8), dtype, sharding=on_device)
    try:
        jax.jit(product).lower(operand, operand).compile()
    except (TypeError, ValueError, jax.errors.JaxRuntimeError):
        return False
    return True
