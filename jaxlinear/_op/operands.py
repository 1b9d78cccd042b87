"""The operands of a product: what it multiplies, and what is kept of it."""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlinear._op.quantized import Quantized, axes_of_scale, quantize


def operand(array, product, position, contracted_axes):
    """``array`` as ``product`` multiplies it, as the first or second: 0 or 1.

    What is in 8 bits already, for a product that asks for 8 bits, is left as it is.
    """
    if not product.is_scaled:
        return array.astype(product.operand_dtype)
    if isinstance(array, Quantized):
        return array
    return quantize(array, product, position, contracted_axes)


def shared_operand(array, *products):
    """``array`` as the first operand of several products, or unchanged.

    It is shared if all take it in one 8-bit dtype with one scale. Its scale is found
    once, and over several devices in one collective.
    """
    own = {(p.dtype[0], p.scaling) for p in products if p.is_scaled}
    is_shared = len(own) == 1 and all(p.scaling == "per_tensor" for p in products)
    return operand(array, products[0], 0, ()) if is_shared else array


def kept_operand(name, array, forward_operand, product, contracted_axes):
    """``array`` as ``product`` multiplies it in the backward pass, as the second.

    The operand of the forward product is kept if it is the same. A rounded or 8-bit
    copy has the checkpoint ``name``.
    """
    kept = _kept_operand(array, forward_operand, product, contracted_axes)
    return kept if kept is array else checkpoint_name(kept, name)


def _kept_operand(array, forward_operand, product, contracted_axes):
    if not product.is_scaled:
        is_array = isinstance(forward_operand, jax.Array)
        if is_array and forward_operand.dtype == product.operand_dtype:
            return forward_operand
        return operand(array, product, 1, contracted_axes)
    axes = axes_of_scale(array, product, contracted_axes)
    if not _is_quantized(forward_operand, product.dtype[1], axes):
        forward_operand = operand(array, product, 1, contracted_axes)
    return _without_array(forward_operand)


def _is_quantized(array, dtype, axes):
    """Whether it is in this dtype, with a scale that is shared along these axes."""
    if not isinstance(array, Quantized) or array.dtype != dtype:
        return False
    return axes == tuple(k for k, n in enumerate(array.scale.shape) if n == 1)


@jax.custom_jvp
def _without_array(operand):
    return operand._replace(array=None)


@partial(_without_array.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    # 8 bits have no room for a tangent, and taking it for zero would be a silent error.
    raise TypeError(
        f"an operand that is kept in {primals[0].dtype} for the backward pass has no"
        " second derivative: leave the products of the gradients in the layer's dtype,"
        " as in `products=jaxlinear.Products(forward=jaxlinear.FLOAT8.forward)`"
    )
