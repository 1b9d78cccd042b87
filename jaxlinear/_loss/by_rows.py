"""The loss of all tokens together, and its gradient in one walk over blocks of rows.

The gradient is computed in the forward pass, where the logits are: three products.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._every_mode import in_every_mode
from jaxlinear._loss.block import (
    in_dtypes,
    left_at_label,
    no_gradients,
    scaled,
    shared_operand,
    times,
    wanted_gradients,
    with_left,
)
from jaxlinear._loss.blocks import block, in_blocks_of_the_platform, put, walk
from jaxlinear._loss.by_classes import (
    differentiated_in_blocks,
    read_all,
    read_in_blocks,
    statistics_of,
)
from jaxlinear._loss.logits import (
    filled_as,
    gradient_at_label,
    joined_over_devices,
)
from jaxlinear._loss.partitioned import Found, Walk, partitioned


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _total(h, weight, bias, labels, weights, spec):
    read = read_all(h, weight, bias, labels, spec)
    return _total_of_read(read, weight, labels, weights, spec)


def _total_of_read(read, weight, labels, weights, spec):
    return _sum(weights * _own(spec.losses(read, labels, weight), spec), spec)


def _own(losses, spec):
    """The losses on the first of the devices that share them, 0 on all others."""
    if not spec.axes:
        return losses
    return jnp.where(lax.axis_index(spec.axes) == 0, losses, 0)


def _sum(array, spec):
    total = jnp.sum(array)
    return lax.psum(total, spec.axes) if spec.axes else total


class KeptTotal(NamedTuple):
    """The gradient of the total, of what is differentiated."""

    X: Any
    W: Any
    B: Any
    weights: Any


def _total_forward(h, weight, bias, labels, weights, spec):
    W, B = weight.value, None if bias is None else bias.value
    over_rows = Walk(_over_rows, spec, wanted_gradients(h, weight, bias))
    rows = labels.value, weights.value
    losses, gradients = partitioned(over_rows, h.value, W, B, rows)
    losses = _own(losses, spec)
    total = _sum(weights.value * losses, spec)
    X, W, B = gradients
    return total, KeptTotal(X, W, B, losses if weights.perturbed else None)


def _over_rows(spec, wanted, X, W, B, rows):
    count = math.prod(X.shape[:-1])  # -1 has no meaning where there are no features.
    flat = X.reshape(count, X.shape[-1]), *(a.reshape(count) for a in rows)
    walk_over_rows = partial(_walk_over_rows, spec, wanted)
    losses, gradients = in_blocks_of_the_platform(
        *(walk_over_rows, X.shape[-1], W, B), *flat
    )
    if gradients.X is not None:
        gradients = gradients._replace(X=gradients.X.reshape(X.shape))
    return Found(losses.reshape(X.shape[:-1]), gradients)


def _walk_over_rows(spec, wanted, blocks, W, B, X, labels, weights):
    """The losses (n,) and the gradients, of rows X (n, in)."""
    X, size = shared_operand(X, spec), blocks.classes(W.shape[0])

    def body(carry, first, rows):
        losses, left, gradients = carry
        X_b, labels_b, weights_b = (block(a, first, rows) for a in (X, labels, weights))
        z = filled_as(X, (rows, W.shape[0]), 0, spec.dtype)
        arrays = X_b, W, B, labels_b
        found, z = read_in_blocks(*arrays, z, spec, size)
        read = joined_over_devices(found, spec.axes).statistics
        g = spec.loss.derivative(read, labels_b, spec.classes(W))
        g, inverse = scaled(times(weights_b, g), spec)
        found = gradients._replace(X=block(gradients.X, first, rows))
        of_rows = read.log_sum_exp, g, inverse
        found = differentiated_in_blocks(found, *arrays, z, of_rows, spec, size)
        gradients = found._replace(X=put(gradients.X, first, found.X))
        g_label = gradient_at_label(read.label, read.log_sum_exp, g, spec.soft_cap)
        its_left = times(inverse, left_at_label(g_label, spec))
        left = jax.tree.map(lambda a, part: put(a, first, part), left, its_left)
        return put(losses, first, spec.losses(read, labels_b, W)), left, gradients

    zeros = filled_as(X, labels.shape, 0, spec.dtype)
    nothing = no_gradients(wanted, X, W, spec.dtype)
    carry = zeros, left_at_label(zeros, spec), nothing
    losses, left, gradients = walk(body, carry, X.shape[0], blocks.rows)
    gradients = with_left(gradients, left, X, W, labels, spec)
    return losses, gradients


def _total_backward(spec, kept, g):
    *gradients, losses = times(g, kept)
    return *in_dtypes(spec, gradients), None, losses


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _total_differential(spec, kept, tangents):
    dX, dW, dB, _, dweights = tangents
    pairs = zip(kept, (dX, dW, dB, dweights), strict=True)
    parts = [jnp.sum(g * d.astype(g.dtype)) for g, d in pairs if d is not None]
    return _sum(jnp.stack(parts), spec)


def _total_of_losses(h, weight, bias, labels, weights, spec):
    read = statistics_of(h, weight, bias, labels, spec)
    return _total_of_read(read, weight, labels, weights, spec)


# Each of many totals has its own cotangent. So the forward pass would not compute one
# weight gradient of all of them, but one of each.
total_of = in_every_mode(_total, _total_differential, mapped=_total_of_losses)
