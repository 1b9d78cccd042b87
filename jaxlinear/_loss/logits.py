"""Logits of a block of the vocabulary: what a loss reads of each row, and its gradient.

z is (*, block), in float32 at least, and what is read of its rows is (*). With p =
exp(z - log Σ exp z), which is the softmax where z is the whole row,

    ∂ log Σ exp z / ∂z_v = p_v     ∂ z_label / ∂z_v = [v = label]     ∂ Σ z / ∂z_v = 1
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._op.formulas import forward_product
from jaxlinear._op.sharding import ArrayType


def logits(X, W, B, product, soft_cap):
    """Z of Y = X Wᵀ + B, in the dtype of the product's result: it is never rounded."""
    Y = forward_product(
        X, W, B, product, ArrayType(product.preferred_element_type, None)
    )
    return capped(Y, soft_cap)


def capped(Y, soft_cap):
    """Z = c tanh(Y / c) with a soft cap c, otherwise Y."""
    return Y if soft_cap is None else soft_cap * jnp.tanh(Y / soft_cap)


class Statistics(NamedTuple):
    """What a loss reads of a row of logits; also its derivative by what it reads.

    log Σ exp z, the logit of the label, Σ z and the place of the maximum. What nothing
    reads is None.
    """

    log_sum_exp: jax.Array
    label: jax.Array
    total: jax.Array | None
    prediction: jax.Array | None


class Rows(NamedTuple):
    """The same of a part of the vocabulary, before the logarithm.

    ``exponentials`` is Σ exp(z - shift), where the shift is the maximum, or 0 if that
    is not finite. ``label`` is 0 if the label is in another part.
    """

    maximum: jax.Array
    exponentials: jax.Array
    label: jax.Array
    total: jax.Array | None
    prediction: jax.Array | None

    @property
    def statistics(self):
        log_sum_exp = _shift(self.maximum) + jnp.log(self.exponentials)
        return Statistics(log_sum_exp, self.label, self.total, self.prediction)


def no_rows(like, dtype, reads_total, predicts):
    """What is read of no part of the vocabulary, of the rows of ``like`` (*)."""
    filled = partial(filled_as, like, like.shape)
    return Rows(
        filled(-jnp.inf, dtype),
        filled(0, dtype),
        filled(0, dtype),
        filled(0, dtype) if reads_total else None,
        filled(0, jnp.int32) if predicts else None,
    )


def filled_as(like, shape, value, dtype):
    """An array of one value that varies as ``like`` does over `jax.shard_map`."""
    varying = tuple(jax.typeof(like).manual_axis_type.varying)
    return lax.pcast(jnp.full(shape, value, dtype), varying, to="varying")


def rows_of(z, labels, first, reads_total, predicts):
    """What is read of z, whose first column is the vocabulary's number ``first``."""
    maximum, prediction = jnp.max(z, -1), None
    if predicts:
        # XLA's maximum on CPUs drops NaN in long rows, but finds its place.
        place = jnp.argmax(z, -1).astype(jnp.int32)
        maximum, prediction = _at(z, place), first + place
    maximum = lax.stop_gradient(maximum)  # What it adds to the logarithm cancels out.
    at = labels - first
    is_here = (labels >= 0) & (at >= 0) & (at < z.shape[-1])
    return Rows(
        maximum,
        jnp.sum(jnp.exp(z - _shift(maximum)[..., None]), -1),
        jnp.where(is_here, _at(z, at), 0),
        jnp.sum(z, -1) if reads_total else None,
        prediction,
    )


def _at(z, places):
    places = jnp.clip(places, 0, z.shape[-1] - 1)
    return jnp.take_along_axis(z, places[..., None], -1)[..., 0]


def joined(a, b):
    """What is read of two parts of the vocabulary, the first of them first."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    prediction = a.prediction
    if prediction is not None:
        is_first_nan = jnp.isnan(b.maximum) & ~jnp.isnan(a.maximum)
        is_later = (b.maximum > a.maximum) | is_first_nan
        prediction = jnp.where(is_later, b.prediction, prediction)
    return Rows(
        maximum,
        _shifted(a, maximum) + _shifted(b, maximum),
        a.label + b.label,
        None if a.total is None else a.total + b.total,
        prediction,
    )


def joined_over_devices(rows, axes):
    """The same where the vocabulary is split over axes of `jax.shard_map`."""
    if not axes:
        return rows
    is_nan = jnp.isnan(rows.maximum)
    order = lax.stop_gradient(jnp.where(is_nan, jnp.inf, rows.maximum))
    maximum, prediction = lax.pmax(order, axes), rows.prediction
    if prediction is not None:
        largest = jnp.iinfo(prediction.dtype).max
        prediction = lax.pmin(jnp.where(order == maximum, prediction, largest), axes)
    sums = _shifted(rows, maximum), rows.label, rows.total
    exponentials, label, total = lax.psum(sums, axes)
    return Rows(maximum, exponentials, label, total, prediction)


def _shifted(rows, maximum):
    return rows.exponentials * jnp.exp(rows.maximum - _shift(maximum))


def _shift(maximum):
    return jnp.where(jnp.isfinite(maximum), maximum, 0)


def is_label(labels, first, size):
    """Of each row, which of a block's classes is its label."""
    # XLA would keep `labels - first == iota` as an array of these numbers.
    shape = *[1] * labels.ndim, size
    return labels[..., None] == first + lax.broadcasted_iota(
        labels.dtype, shape, labels.ndim
    )


def gradient(z, labels, first, log_sum_exp, g, soft_cap):
    """∂Loss/∂Y of a block, from the derivative ``g`` by what the loss reads."""
    D = jnp.where(is_label(labels, first, z.shape[-1]), g.label[..., None], 0)
    g = jax.tree.map(lambda a: a[..., None], g)
    return _gradient(z, log_sum_exp[..., None], D, g, soft_cap)


def gradient_at_label(z, log_sum_exp, g, soft_cap):
    """The same at the label only, whose logit is z (*)."""
    return _gradient(z, log_sum_exp, g.label, g, soft_cap)


def _gradient(z, log_sum_exp, D, g, soft_cap):
    D += g.log_sum_exp * jnp.exp(z - log_sum_exp)
    D = D if g.total is None else D + g.total
    return D if soft_cap is None else D * (1 - (z / soft_cap) ** 2)


# What the operands of the products of a gradient need.


def rounded(D, dtype):
    """D rounded to the operands of its products, but in its own dtype.

    The label's residual must be what is rounded away: XLA may drop a cast to bfloat16
    or float16 before a cast to float32.
    """
    if dtype == D.dtype:
        return D
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(D, bits.nexp, bits.nmant)


def scale_for_float16(g):
    """A power of two by which ``g`` is multiplied where its operands are in float16.

    The gradient of a large vocabulary is smaller than what float16 has: its largest
    value becomes nearly the largest of that dtype.
    """
    # With initial values, because there may be no rows.
    largest = sum(jnp.max(jnp.abs(a), initial=0) for a in jax.tree.leaves(g))
    # Neither the scale nor its inverse overflows.
    bounded = jnp.maximum(largest, 2.0**-100)
    power_of_two = lax.reduce_precision(bounded, exponent_bits=8, mantissa_bits=0)
    return jnp.where(jnp.isfinite(largest), 2.0**14 / power_of_two, 1)
