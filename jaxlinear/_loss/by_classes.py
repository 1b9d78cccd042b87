"""What a loss reads of the logits, and its gradient: walks over blocks of the classes.

The backward pass computes each block of the logits again: four products in all.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear._every_mode import in_every_mode
from jaxlinear._loss.block import (
    Gradients,
    gradients_of_block,
    in_dtypes,
    left_at_label,
    no_gradients,
    scaled,
    shared_operand,
    times,
    wanted_gradients,
    with_derivatives_in_float32,
    with_left,
)
from jaxlinear._loss.blocks import add, block, put, vocabulary_block, walk
from jaxlinear._loss.logits import (
    Statistics,
    filled_as,
    gradient,
    gradient_at_label,
    is_label,
    joined,
    joined_over_devices,
    no_rows,
)
from jaxlinear._loss.partitioned import Found, Walk, partitioned


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _statistics(h, weight, bias, labels, spec):
    return read_all(h, weight, bias, labels, spec)


def read_all(h, weight, bias, labels, spec):
    return partitioned(Walk(_read, spec, None), h, weight, bias, labels).rows


def _read(spec, _, X, W, B, labels):
    X, size = shared_operand(X, spec), vocabulary_block(W.shape[0])
    rows, _ = read_in_blocks(X, W, B, labels, None, spec, size)
    read = joined_over_devices(rows, spec.axes).statistics
    return Found(read, Gradients(None, None, None))


def read_in_blocks(X, W, B, labels, z, spec, size):
    """What is read of a device's classes, and the logits if ``z`` is their place."""
    start = spec.first_of(W)

    def body(carry, first, size):
        rows, z = carry
        W_b, B_b = block(W, first, size), block(B, first, size)
        z_b = spec.logits(X, shared_operand(W_b, spec), B_b)
        rows = joined(rows, spec.rows_of(z_b, labels, start + first))
        return rows, put(z, first, z_b, axis=-1)

    rows = no_rows(labels, spec.dtype, spec.reads_total, spec.predicts)
    return walk(body, (rows, z), W.shape[0], size)


class Kept(NamedTuple):
    """The arguments, what was read of the logits (*), and what is differentiated."""

    X: Any
    W: Any
    B: Any
    labels: jax.Array
    log_sum_exp: jax.Array
    label: jax.Array
    wanted: Gradients  # An empty tuple for what is wanted, otherwise None.


def _statistics_forward(h, weight, bias, labels, spec):
    W, B = weight.value, None if bias is None else bias.value
    read = read_all(h.value, W, B, labels.value, spec)
    return read, Kept(
        *(h.value, W, B, labels.value, read.log_sum_exp, read.label),
        wanted=wanted_gradients(h, weight, bias),
    )


def _statistics_backward(spec, kept, g):
    X, W, B, labels, log_sum_exp, label, wanted = kept
    g, inverse = scaled(g._replace(prediction=None), spec)
    rows = labels, log_sum_exp, label, g
    found = partitioned(Walk(_differentiated, spec, wanted), X, W, B, rows)
    return *in_dtypes(spec, times(inverse, found.gradients)), None


def _differentiated(spec, wanted, X, W, B, rows):
    labels, log_sum_exp, label, g = rows
    X, size = shared_operand(X, spec), vocabulary_block(W.shape[0])
    found = no_gradients(wanted, X, W, spec.dtype)
    of_rows = log_sum_exp, g, None
    found = differentiated_in_blocks(found, X, W, B, labels, None, of_rows, spec, size)
    g_label = gradient_at_label(label, log_sum_exp, g, spec.soft_cap)
    left = left_at_label(g_label, spec)
    return Found(None, with_left(found, left, X, W, labels, spec))


def differentiated_in_blocks(found, X, W, B, labels, z, of_rows, spec, size):
    """``found`` and the gradients of a device's classes.

    The logits are z, or computed again if it is None. ``of_rows`` is log Σ exp z, the
    derivative by what was read, and the inverse of a scale of that, or None.
    """
    start, (log_sum_exp, g, inverse) = spec.first_of(W), of_rows
    wanted = Gradients(*(None if a is None else () for a in found))

    def body(found, first, size):
        W_b, B_b = block(W, first, size), block(B, first, size)
        W_b = shared_operand(W_b, spec)
        z_b = spec.logits(X, W_b, B_b) if z is None else block(z, first, size, axis=-1)
        G = gradient(z_b, labels, start + first, log_sum_exp, g, spec.soft_cap)
        part = times(inverse, gradients_of_block(G, X, W_b, wanted, spec))
        return Gradients(
            X=None if found.X is None else found.X + part.X,
            W=add(found.W, first, part.W),
            B=add(found.B, first, part.B),
        )

    return walk(body, found, W.shape[0], size)


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)


def _statistics_differential(spec, kept, tangents):
    tangent = with_derivatives_in_float32(_tangents, spec, kept, tangents)
    if not spec.predicts:
        return tangent
    prediction = np.zeros(kept.labels.shape, jax.dtypes.float0)
    return tangent._replace(prediction=prediction)


def _tangents(spec, kept, tangents):
    """The tangents of what is read, a block at a time: Σ p dz, dz_label and Σ dz."""
    X, W, B, labels, log_sum_exp, _, _ = kept
    dX, dW, dB, _ = tangents
    start = spec.first_of(W)

    def body(tangent, first, size):
        def of_block(array):
            return block(array, first, size)

        at = Gradients(X, of_block(W), of_block(B))
        moving = Gradients(dX, of_block(dW), of_block(dB))
        z, dz = _jvp(spec.logits, at, moving)
        p = jnp.exp(z - log_sum_exp[..., None])
        at_label = jnp.where(is_label(labels, start + first, size), dz, 0)
        return Statistics(
            log_sum_exp=tangent.log_sum_exp + jnp.sum(p * dz, -1),
            label=tangent.label + jnp.sum(at_label, -1),
            total=jnp.sum(dz, -1) + tangent.total if spec.reads_total else None,
            prediction=None,
        )

    zero = filled_as(labels, labels.shape, 0, spec.dtype)
    none = Statistics(zero, zero, zero if spec.reads_total else None, None)
    tangent = walk(body, none, W.shape[0], vocabulary_block(W.shape[0]))
    return lax.psum(tangent, spec.axes) if spec.axes else tangent


def _jvp(function, at, moving):
    """The value and the tangent of ``function`` along what is not None."""
    along = {k: tangent for k, tangent in enumerate(moving) if tangent is not None}

    def of_some(some):
        return function(*(some.get(k, array) for k, array in enumerate(at)))

    return jax.jvp(of_some, ({k: at[k] for k in along},), (along,))


statistics_of = in_every_mode(
    _statistics,
    _statistics_differential,
    leading=["h", "labels", "X", "log_sum_exp", "label"],
)
