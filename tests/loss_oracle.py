"""The loss of a linear layer in float64, by NumPy, and the same by JAX with logits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear import linear


def exact(h, weight, labels, bias=None, **options):
    """The losses (*), log Σ exp z (*), and z, in float64."""
    ε, ζ = options.get("label_smoothing", 0), options.get("z_loss", 0)
    z = as_float64(h) @ as_float64(weight).T
    if bias is not None:
        z = z + as_float64(bias)
    if cap := options.get("soft_cap"):
        z = cap * np.tanh(z / cap)
    log_sum_exp = np.logaddexp.reduce(z, -1)
    is_counted = counted(labels, z.shape[-1], options)
    places = np.where(is_counted, labels, 0)[..., None]
    of_label = np.take_along_axis(z, places, -1)[..., 0]
    losses = log_sum_exp - (1 - ε) * of_label + ζ * log_sum_exp**2
    losses -= ε * z.mean(-1) if ε else 0
    return np.where(is_counted, losses, 0), log_sum_exp, z


def exact_gradients(h, weight, labels, bias=None, *, cotangents, **options):
    """∇h, ∇W and ∇B of Σ cotangents · losses, in float64."""
    ε, ζ = options.get("label_smoothing", 0), options.get("z_loss", 0)
    _, log_sum_exp, z = exact(h, weight, labels, bias, **options)
    classes = z.shape[-1]
    is_counted = counted(labels, classes, options)[..., None]
    is_label = np.asarray(labels)[..., None] == np.arange(classes)
    G = (1 + 2 * ζ * log_sum_exp[..., None]) * np.exp(z - log_sum_exp[..., None])
    G -= (1 - ε) * is_label + ε / classes
    if cap := options.get("soft_cap"):
        G *= 1 - (z / cap) ** 2
    G = np.where(is_counted, G * np.asarray(cotangents)[..., None], 0)
    G = G.reshape(-1, classes)
    grad_h = (G @ as_float64(weight)).reshape(h.shape)
    grad_W = G.T @ as_float64(h).reshape(-1, h.shape[-1])
    return grad_h, grad_W, G.sum(0)


def counted(labels, classes, options):
    labels = np.asarray(labels).astype(np.int64)
    is_ignored = labels == options.get("ignore_index", -100)
    return (labels >= 0) & (labels < classes) & ~is_ignored


def exact_loss(*arguments, reduction="mean", weights=None, **options):
    losses, *_ = exact(*arguments, **options)
    weights = weights_of(arguments, weights, options)
    if reduction == "none":
        return losses * weights
    return (losses * weights).sum() / divisor(weights, reduction)


def exact_loss_gradients(*arguments, reduction="mean", weights=None, **options):
    weights = weights_of(arguments, weights, options)
    cotangents = weights / divisor(weights, reduction)
    return exact_gradients(*arguments, cotangents=cotangents, **options)


def weights_of(arguments, weights, options):
    _, weight, labels, *_ = arguments
    is_counted = counted(labels, weight.shape[0], options)
    return is_counted * (1.0 if weights is None else as_float64(weights))


def divisor(weights, reduction):
    return (weights.sum() or 1) if reduction == "mean" else 1


def unfused(h, weight, labels, bias=None, *, dtype=None, products=None, **options):
    """The losses (*) from the logits of our layer, in float32."""
    z = linear(h, weight, bias, dtype="float32", products=products)
    ε, ζ = options.get("label_smoothing", 0), options.get("z_loss", 0)
    if cap := options.get("soft_cap"):
        z = cap * jnp.tanh(z / cap)
    log_sum_exp = jax.nn.logsumexp(z, -1)
    is_counted = (labels >= 0) & (labels < z.shape[-1])
    places = jnp.where(is_counted, labels, 0)[..., None]
    losses = log_sum_exp - (1 - ε) * jnp.take_along_axis(z, places, -1)[..., 0]
    losses = losses + ζ * log_sum_exp**2 - (ε * z.mean(-1) if ε else 0)
    return jnp.where(is_counted, losses, 0)


def as_float64(array):
    return np.asarray(array).astype(np.float64)
