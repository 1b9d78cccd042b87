"""Eight-bit operands: values with a scale, and the product of two of them.

With a ≈ s_a â and b ≈ s_b b̂, of which the hats have 8 bits, Σ a b ≈ s_a s_b Σ â b̂: the
sum is that of 8-bit values, and the scales are multiplied once. That takes scales which
are constant along the contracted axes.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxlinear._op.by_platform import by_platform, visible_by_platform
from jaxlinear._op.cpu import has_one_device, has_own_form
from jaxlinear._op.multiply import ArrayProduct, multiply_arrays
from jaxlinear._op.sharding import sharded_as_factor, without_reduced_axes
from jaxlinear._plain import dot_general
from jaxlinear._product import Product

REASON_ON_CPU = (
    "8-bit operands are multiplied in bfloat16 or float32, which have each of their"
    " values: on a CPU 8 bits are no faster than bfloat16, but half of the bytes."
)


class Quantized(NamedTuple):
    """An array in 8 bits, ``values * scale``.

    The scale is float32 and has the axes of the values, of length one where it is
    shared along them. ``array`` is the array that was quantized, for derivatives, or
    None if it is not kept.
    """

    values: jax.Array
    scale: jax.Array
    array: jax.Array | None = None

    @property
    def ndim(self):
        return self.values.ndim

    @property
    def dtype(self):
        return self.values.dtype

    def astype(self, dtype):
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(array, product, position, contracted_axes):
    """``array`` as a product of 8 bits multiplies it in the ``position`` 0 or 1."""
    axes = axes_of_scale(array, product, contracted_axes)
    # The product has a derivative, which is that of the array.
    values = _quantized(lax.stop_gradient(array), product.dtype[position], axes)
    return values._replace(array=array)


def axes_of_scale(array, product, contracted_axes):
    """The axes along which one scale is shared."""
    is_per_row = product.scaling == "per_row"
    return tuple(contracted_axes) if is_per_row else tuple(range(array.ndim))


def _quantized(array, dtype, axes):
    """``array`` in ``dtype``, with a scale that is shared along ``axes``."""
    is_integer = dtype == "int8"
    top = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    array = without_reduced_axes(array).astype(jnp.float32)
    # Float8 has a NaN, so its scale can be that of the other values.
    largest = by_platform(_Largest(tuple(axes), of_finite=not is_integer), array)
    # A floor, so that zeros have a scale. Some devices take smaller numbers for zero.
    least = float(jnp.finfo(jnp.float32).tiny)
    scale = checkpoint_name(jnp.maximum(largest / top, least), "linear_scale")
    values = array / scale
    if is_integer:
        # The scale is infinite or NaN where a value is, and the finite values are zero.
        values = jnp.where(jnp.isinf(array), jnp.sign(array), jnp.round(values))
    return Quantized(values.astype(dtype), scale)


class _Largest(NamedTuple):
    """The largest magnitude along ``axes``.

    With ``of_finite`` only finite values count; else it is NaN if a value is NaN. The
    barriers keep XLA from computing the maximum of a constant, such as a weight that a
    program closes over: its interpreter takes a minute for 4096 × 4096.
    """

    axes: tuple[int, ...]
    of_finite: bool

    platforms = ("cpu",)

    def plain(self, array):
        one = lax.optimization_barrier(jnp.ones((), array.dtype))
        return self._maximum(array * one)  # Fused, where a barrier would make a copy.

    def on(self, platform, is_alone, array):
        if platform != "cpu":
            return self.plain(array)
        array = lax.optimization_barrier(array)
        if self.of_finite:
            return self._maximum(array)
        # XLA's maximum drops NaN there, from 4,096 elements on.
        if has_one_device():  # Its sums keep NaN, and are as fast.
            squares = jnp.sum(array * array, self.axes, keepdims=True)
            return jnp.where(jnp.isnan(squares), squares, self._maximum(array))
        # One collective instead of two: magnitudes have the order of their bits, in
        # which NaN is the largest.
        bits = lax.bitcast_convert_type(jnp.abs(array), jnp.int32)
        largest = jnp.max(bits, self.axes, keepdims=True, initial=0)
        return lax.bitcast_convert_type(largest, array.dtype)

    def _maximum(self, array):
        if self.of_finite:
            array = jnp.where(jnp.isfinite(array), array, 0)
        return jnp.max(jnp.abs(array), self.axes, keepdims=True, initial=0)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def multiply_quantized(a, b, contracted_axes, product, sharding):
    """The product of 8-bit operands. ``b`` may lack the array that it was made of.

    The derivative is that of a product of the arrays: tangents are not quantized.
    """
    varying = [k for k, j in enumerate(contracted_axes[1]) if b.scale.shape[j] != 1]
    if varying and _varies_elsewhere(b.scale, contracted_axes[1]):
        # `jax.vmap` makes such a scale of one for each row. It is not a factor of the
        # sum. Bfloat16 has the bits of an 8-bit value with its scale.
        scaled = Product(jnp.dtype("bfloat16"), product.precision, jnp.dtype("float32"))
        arrays = a.array.astype(scaled.dtype), b.astype(scaled.dtype)
        Y = multiply_arrays(*arrays, contracted_axes, scaled, sharding)
        return Y.astype(product.preferred_element_type)
    if varying:
        array, b = _with_scale_of(b, a, contracted_axes)
        a = quantize(array, product, 0, contracted_axes[0])
    scale = _scale_of_product(a, b, contracted_axes, sharding)
    form = _ScaledProduct(contracted_axes, product, sharding)
    is_rounded = product.preferred_element_type == "bfloat16" and not scale.ndim
    if is_rounded and product.dtype[0] != "int8":
        return visible_by_platform(form, a.values, b.values, scale)
    return form.plain(a.values, b.values, scale)


class _ScaledProduct(NamedTuple):
    contracted_axes: tuple[tuple[int, ...], tuple[int, ...]]
    product: Product
    sharding: Any

    platforms = "cuda", "rocm", "tpu"

    def plain(self, a, b, scale):
        return self._scaled(a, b, scale, jnp.dtype("float32"), jnp.dtype("float32"))

    def on(self, platform, is_alone, a, b, scale):
        leaving = self.product.preferred_element_type
        # XLA for GPUs makes one call of it, with a float32 scale and one rounding.
        # Devices sum partial sums in bfloat16, as without 8 bits.
        wide = jnp.dtype("float32") if platform == "tpu" else leaving
        return self._scaled(a, b, scale, leaving, wide)

    def _scaled(self, a, b, scale, product_dtype, dtype):
        options = self.product.precision, product_dtype, self.sharding
        Y = _multiply_values(a, b, self.contracted_axes, *options).astype(dtype)
        return (Y * scale.astype(dtype)).astype(self.product.preferred_element_type)


@partial(multiply_quantized.defjvp, symbolic_zeros=True)
def _(contracted_axes, product, sharding, primals, tangents):
    (a, b), (da, db) = primals, (tangent.array for tangent in tangents)
    Y = multiply_quantized(a, b, contracted_axes, product, sharding)
    unquantized = Product(Y.dtype, product.precision, Y.dtype)

    def product_of(a, b):
        arrays = a.astype(Y.dtype), b.astype(Y.dtype)
        return multiply_arrays(*arrays, contracted_axes, unquantized, sharding)

    dY = jnp.zeros_like(Y)
    if not isinstance(da, SymbolicZero | None):
        dY += product_of(da, b)
    if not isinstance(db, SymbolicZero | None):
        dY += product_of(a, db)
    return Y, dY


def _scale_of_product(a, b, contracted_axes, sharding):
    """The scales of both, multiplied: a scalar, or with the axes of the product."""
    rows, columns = (
        jnp.squeeze(o.scale, axes)
        for o, axes in zip((a, b), contracted_axes, strict=True)
    )
    if all(length == 1 for length in (*rows.shape, *columns.shape)):
        rows, columns = rows.reshape(()), columns.reshape(())
    else:
        before, after = range(rows.ndim), range(rows.ndim, rows.ndim + columns.ndim)
        rows, columns = jnp.expand_dims(rows, after), jnp.expand_dims(columns, before)
    if sharding is not None:
        rows, columns = (sharded_as_factor(s, sharding) for s in (rows, columns))
    return rows * columns


def _multiply_values(a, b, contracted_axes, precision, dtype, sharding):
    """The product of 8-bit values, with a result of ``dtype``."""
    form = _ValuesProduct(contracted_axes, precision, dtype, sharding)
    return visible_by_platform(form, a, b)


class _ValuesProduct(NamedTuple):
    contracted_axes: tuple[tuple[int, ...], tuple[int, ...]]
    precision: Any
    dtype: np.dtype
    sharding: Any

    platforms = ("cpu",)

    def plain(self, a, b):
        is_short = a.dtype == "int8" and not _may_overflow(a, self.contracted_axes[0])
        Y = dot_general(
            a,
            b,
            (self.contracted_axes, ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.dtype("int32") if is_short else self.dtype,
            out_sharding=self.sharding,
        )
        return Y.astype(self.dtype)

    def on(self, platform, is_alone, a, b):
        # With several devices a cast operand is gathered for each product again.
        if platform != "cpu" or not has_one_device():
            return self.plain(a, b)
        # XLA has no instructions for float8 there, and for int8 none in Gᵀ X. Bfloat16
        # has each of these values, and float32 each product of two of them.
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        wide = Product(a.dtype, self.precision, jnp.dtype("float32"))
        arrays = ArrayProduct(self.contracted_axes, wide, self.sharding)
        options = self.contracted_axes, self.precision, self.sharding
        if has_own_form(a, b, *options):
            return arrays.on(platform, is_alone, a, b).astype(self.dtype)
        return arrays.plain(a, b).astype(self.dtype)


def _may_overflow(a, contracted_axes):
    """Whether so many products of int8 could be more than int32 has."""
    count = math.prod(a.shape[axis] for axis in contracted_axes)
    try:
        return bool(count * 127**2 > jnp.iinfo("int32").max)
    except jax.errors.InconclusiveDimensionOperation:  # A size of any length.
        return True


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
    return a.array.astype(one.dtype) * b.scale.reshape(shape), b._replace(scale=one)
