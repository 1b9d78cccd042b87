"""Eight-bit operands: values with a scale, and the product of two of them.

With a ≈ s_a â and b ≈ s_b b̂, of which the hats have 8 bits, Σ a b ≈ s_a s_b Σ â b̂: the
sum is that of 8-bit values, and the scales are multiplied once. That takes scales which
are constant along the contracted axes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxlinear._multiply import multiply_arrays
from jaxlinear._product import Product


class Quantized(NamedTuple):
    """An array in 8 bits, ``values * scale``.

    The scale is float32 and has the axes of the values, of length one where it is
    shared along them.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def ndim(self):
        return self.values.ndim

    def astype(self, dtype):
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def as_operand(array, product, position, contracted_axes):
    """``array`` as ``product`` multiplies it, in the ``position`` 0 or 1: cast, or quantized."""
    if not product.is_scaled:
        return array.astype(product.operand_dtype)
    is_per_row = product.scaling == "per_row"
    axes = contracted_axes if is_per_row else tuple(range(array.ndim))
    return _quantized(array, product.dtype[position], axes)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _quantized(array, dtype, axes):
    """``array`` in ``dtype``, with a scale that is shared along ``axes``."""
    is_integer = dtype == "int8"
    top = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    array = array.astype(jnp.float32)
    finite = jnp.where(jnp.isfinite(array), jnp.abs(array), 0)
    # Of zeros, too. A smaller number is a zero to some devices.
    least = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.maximum(jnp.max(finite, axes, keepdims=True, initial=0) / top, least)
    values = array / scale
    if is_integer:
        # There is no infinity and no NaN, but the scale may be: then the rest is zero.
        worst = jnp.max(jnp.abs(array), axes, keepdims=True, initial=0)
        infinite = jnp.sign(array) * jnp.isinf(array)
        values = jnp.where(jnp.isfinite(worst), jnp.round(values), infinite)
        scale = jnp.where(jnp.isfinite(worst), scale, worst)
    quantized = Quantized(values.astype(dtype), scale)
    return checkpoint_name(quantized, "linear_operand")


@_quantized.defjvp
def _(dtype, axes, primals, tangents):
    raise TypeError(
        f"an operand that is kept in {dtype} for the backward pass has no second"
        " derivative: leave the products of the gradients in the layer's dtype, as in"
        " `products=jaxlinear.Products(forward=jaxlinear.FLOAT8.forward)`"
    )


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def multiply_quantized(a, b, contracted_axes, product, sharding):
    """The product of 8-bit operands. ``b`` may be quantized already, ``a`` is not.

    Its derivative is that of the product of the operands as they came: neither the
    tangents nor, there, the operands are quantized, unless they came so.
    """
    if isinstance(b, Quantized):
        varying = [k for k, j in enumerate(contracted_axes[1]) if b.scale.shape[j] != 1]
        if varying and _varies_elsewhere(b.scale, contracted_axes[1]):
            return _sum_over(varying[0], a, b, contracted_axes, product, sharding)
        if varying:
            a, b = _with_scale_of(b, a, contracted_axes)
    else:
        b = as_operand(b, product, 1, contracted_axes[1])
    a = as_operand(a, product, 0, contracted_axes[0])
    rows, columns = (
        jnp.squeeze(o.scale, axes) for o, axes in zip((a, b), contracted_axes, strict=True)
    )
    scale = jnp.expand_dims(rows, range(rows.ndim, rows.ndim + columns.ndim)) * columns
    is_scalar = all(length == 1 for length in scale.shape)
    scale = scale.reshape(()) if is_scalar else scale
    leaving = product.preferred_element_type

    def scaled(dtype):
        def multiplied(a, b, scale):
            Y = _multiply_values(a, b, contracted_axes, product.precision, dtype, sharding)
            return (Y * scale.astype(Y.dtype)).astype(leaving)

        return multiplied

    wide = scaled(jnp.dtype("float32"))
    if not is_scalar or leaving != jnp.bfloat16 or product.dtype[0] == "int8":
        return wide(a.values, b.values, scale)
    # XLA for GPUs makes one call of this, with a float32 scale and one rounding.
    narrow = scaled(leaving)
    return lax.platform_dependent(
        a.values, b.values, scale, cuda=narrow, rocm=narrow, default=wide
    )


@partial(multiply_quantized.defjvp, symbolic_zeros=True)
def _(contracted_axes, product, sharding, primals, tangents):
    (a, b), (da, db) = primals, tangents
    leaving = product.preferred_element_type
    unquantized = Product(leaving, product.precision, leaving)

    def product_of(a, b):
        return multiply_arrays(a, b, contracted_axes, unquantized, sharding)

    dY = [] if isinstance(da, SymbolicZero) else [product_of(da, b)]
    # Of a quantized operand there is no tangent.
    if not isinstance(b, Quantized) and not isinstance(db, SymbolicZero):
        dY += [product_of(a, db)]
    Y = multiply_quantized(a, b, contracted_axes, product, sharding)
    return Y, sum(dY, jnp.zeros_like(Y)) if not dY else sum(dY[1:], dY[0])


def _multiply_values(a, b, contracted_axes, precision, dtype, sharding):
    """The product of 8-bit values, with a result of ``dtype``."""

    def plain(a, b):
        Y = lax.dot_general(
            a,
            b,
            (contracted_axes, ((), ())),
            precision=precision,
            preferred_element_type="int32" if a.dtype == "int8" else dtype,
            out_sharding=sharding,
        )
        return Y.astype(dtype)

    def on_cpu(a, b):
        # Which has no instructions for float8. Each value is one of bfloat16, too.
        product = Product(jnp.dtype("bfloat16"), precision, dtype)
        return multiply_arrays(a, b, contracted_axes, product, sharding)

    if a.dtype == "int8":
        return plain(a, b)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=plain)


def _varies_elsewhere(scale, contracted_axes):
    free = set(range(scale.ndim)) - set(contracted_axes)
    return any(scale.shape[axis] != 1 for axis in free)


def _with_scale_of(b, a, contracted_axes):
    """``a`` times the scale of ``b``, which varies along contracted axes, and ``b``.

    `jax.vmap` makes such a scale, where what it maps is contracted.
    """
    shape = [1] * a.ndim
    for i, j in zip(*contracted_axes, strict=True):
        shape[i] = b.scale.shape[j]
    one = jnp.ones((1,) * b.ndim, b.scale.dtype)
    return a.astype(one.dtype) * b.scale.reshape(shape), b._replace(scale=one)


def _sum_over(k, a, b, contracted_axes, product, sharding):
    """The same, where the scale of ``b`` varies along other axes, too: a sum of products.

    ``k`` is the place among the contracted axes of the one that is summed at last.
    """
    mapped = tuple(axes[k] for axes in contracted_axes)
    inner = tuple(
        tuple(i - (i > removed) for i in axes if i != removed)
        for axes, removed in zip(contracted_axes, mapped, strict=True)
    )
    wide = product._replace(preferred_element_type=jnp.dtype("float32"))

    def each(a, b):
        return multiply_quantized(a, b, inner, wide, sharding)

    total = jnp.sum(jax.vmap(each, mapped)(a, b), 0)
    return total.astype(product.preferred_element_type)
