"""How far the loss of a last layer is from that in float64, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._loss.functions import linear_cross_entropy
from jaxlinear._product import accumulator_dtype
from jaxlinear.inspect._accuracy import (
    DTYPES,
    FEATURES,
    ROWS,
    Measurement,
    arguments,
    layers,
    norm,
    of_operands,
    unit_roundoff,
)
from jaxlinear.inspect._rounding import rounding

CLASSES = 1024
QUANTITIES = "loss", "loss ∇X", "loss ∇W", "loss ∇B"


def _ours(x, weight, bias, labels, dtype):
    return linear_cross_entropy(x, weight, labels, bias, dtype=dtype)


def _with_logits_of(layer):
    def loss(x, weight, bias, labels, dtype):
        z = layer(x, weight, bias, dtype).astype("float32")
        of_label = jnp.take_along_axis(z, labels[:, None], -1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(z, -1) - of_label)

    return loss


def measured_losses(device):
    """Yield the measurements at the default precision, those of one dtype together."""
    losses = {name: _with_logits_of(layer) for name, layer in layers().items()}
    losses["jaxlinear"] = _ours
    for name, dtypes in DTYPES.items():
        yield from _measured(device, name, *dtypes, losses)


def _measured(device, name, argument_dtype, dtype, losses):
    *arrays, _ = arguments(argument_dtype, dtype, CLASSES)
    labels = np.random.default_rng(1).integers(CLASSES, size=ROWS, dtype=np.int32)
    expected = _expected(arrays, labels, dtype, rounding(device, dtype))
    for layer, loss in losses.items():
        with jax.default_matmul_precision(None):
            value, gradients = _value_and_gradients(loss, dtype)(*arrays, labels)
        for quantity, actual, (exact, explained) in zip(
            QUANTITIES, (value, *gradients), expected, strict=True
        ):
            error = norm(np.asarray(actual, np.float64) - exact)
            explained += _of_result(actual.dtype, exact)
            errors = float(error / norm(exact)), float(explained / norm(exact))
            yield Measurement(name, quantity, layer, "default", *errors)


def _of_result(dtype, exact):
    """The error of one rounding, in the mean square: also of what is subnormal."""
    of_subnormal = float(jnp.finfo(dtype).smallest_subnormal) * np.sqrt(exact.size / 12)
    return unit_roundoff(dtype) / np.sqrt(3) * norm(exact) + of_subnormal


def _value_and_gradients(loss, dtype):
    @jax.jit
    def results(x, weight, bias, labels):
        def of(*arrays):
            return loss(*arrays, labels, dtype)

        return jax.value_and_grad(of, (0, 1, 2))(x, weight, bias)

    return results


def _expected(arrays, labels, dtype, of_device):
    """The loss, ∇X, ∇W and ∇B in float64, with the error of the products and of G.

    A logit is off by δ = √n u Σ|term|, a sum in float32, and so is log Σ exp z at most.
    G = (p - onehot) / rows is off by p δ, and where it is rounded to a ``dtype`` below
    float32 by u |G| / √3 in the mean square, but not at the label, whose residual is
    put back. These errors are independent. Where the device rounds the operands of
    products in float32, δ and the error of both gradients have that as well.
    """
    X, W, B = arrays
    X, W = X.astype(dtype), W.astype(dtype)
    X, W, B = (np.asarray(a, np.float64) for a in (X, W, B))
    z = X @ W.T + B
    largest = z.max(-1, keepdims=True)
    log_sum_exp = largest + np.log(np.exp(z - largest).sum(-1, keepdims=True))
    p, row = np.exp(z - log_sum_exp), np.arange(ROWS)
    onehot = np.zeros_like(p)
    onehot[row, labels] = 1
    G = (p - onehot) / ROWS
    results = [
        np.mean(log_sum_exp[:, 0] - z[row, labels]),
        *(G @ W, G.T @ X, G.sum(axis=0)),
    ]

    accumulator = accumulator_dtype(dtype)
    of_sum = unit_roundoff(accumulator)
    δ = np.sqrt(FEATURES + 1) * of_sum * (np.abs(X) @ np.abs(W).T + np.abs(B))
    of_logits, moved = of_operands(X, W.T, of_device)
    δ += np.sqrt(of_logits) + moved
    variance = (p * δ / ROWS) ** 2
    of_products = variance
    if jnp.dtype(dtype) != accumulator:
        of_products = variance + (1 - onehot) * (unit_roundoff(dtype) * G) ** 2 / 3
    of_X, moved_X = of_operands(G, W, of_device)
    of_W, moved_W = of_operands(G.T, X, of_device)
    variances = (
        of_products @ W**2 + of_X,
        of_products.T @ X**2 + of_W,
        variance.sum(axis=0),
    )
    magnitudes = np.abs(G) @ np.abs(W), np.abs(G).T @ np.abs(X), np.abs(G).sum(axis=0)
    moved = norm(moved_X), norm(moved_W), 0.0
    roundings = [
        1.1 * np.sqrt(np.sum(v)) + np.sqrt(terms) * of_sum * norm(magnitude) + by
        for v, magnitude, terms, by in zip(
            variances, magnitudes, (CLASSES, ROWS, ROWS), moved, strict=True
        )
    ]
    of_loss = np.mean(δ.max(-1) + np.sqrt(CLASSES) * of_sum)
    return list(zip(results, [of_loss, *roundings], strict=True))
