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


def exact_gradients(
    h, weight, labels, bias=None, *, cotangents, of_log_sum_exp=None, **options
):
    """∇h, ∇W and ∇B of Σ cotangents · losses, in float64.

    And of Σ of_log_sum_exp · log Σ exp z, of all tokens, if that is not None.
    """
    ε, ζ = options.get("label_smoothing", 0), options.get("z_loss", 0)
    _, log_sum_exp, z = exact(h, weight, labels, bias, **options)
    classes = z.shape[-1]
    is_counted = counted(labels, classes, options)[..., None]
    is_label = np.asarray(labels)[..., None] == np.arange(classes)
    p = np.exp(z - log_sum_exp[..., None])
    G = (1 + 2 * ζ * log_sum_exp[..., None]) * p - (1 - ε) * is_label - ε / classes
    G = np.where(is_counted, G * np.asarray(cotangents)[..., None], 0)
    if of_log_sum_exp is not None:
        G = G + p * np.asarray(of_log_sum_exp)[..., None]
    if cap := options.get("soft_cap"):
        G *= 1 - (z / cap) ** 2
    G = G.reshape(-1, classes)
    grad_h = (G @ as_float64(weight)).reshape(h.shape)
    grad_W = G.T @ as_float64(h).reshape(-1, h.shape[-1])
    return grad_h, grad_W, G.sum(0)


def counted(labels, classes, options):
    return in_range(np.asarray(labels).astype(np.int64), classes, options)


def in_range(labels, classes, options):
    """Which labels have a loss. They are signed, NumPy's or JAX's."""
    is_counted = (labels >= 0) & (labels < classes)
    ignored = options.get("ignore_index", -100)
    return is_counted & (labels != ignored) if 0 <= ignored < classes else is_counted


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
    """The losses (*) from the logits of our layer, in float32, or in float64 of it."""
    z = unfused_logits(h, weight, bias, products, options.get("soft_cap"))
    ε, ζ = options.get("label_smoothing", 0), options.get("z_loss", 0)
    log_sum_exp = jax.nn.logsumexp(z, -1)
    is_counted = in_range(labels.astype("int32"), z.shape[-1], options)
    places = jnp.where(is_counted, labels, 0)[..., None]
    losses = log_sum_exp - (1 - ε) * jnp.take_along_axis(z, places, -1)[..., 0]
    losses = losses + ζ * log_sum_exp**2 if ζ else losses
    losses = losses - ε * z.mean(-1) if ε else losses
    return jnp.where(is_counted, losses, 0)


def unfused_logits(h, weight, bias, products, cap):
    wide = "float64" if h.dtype == "float64" else "float32"
    z = linear(h, weight, bias, dtype=wide, products=products)
    return cap * jnp.tanh(z / cap) if cap else z


def as_float64(array):
    return np.asarray(array).astype(np.float64)


def problem(classes, leading=(3, 20), features=16, dtype="float32", seed=0):
    """h, weight, labels of which some are ignored, bias and weights of tokens."""
    rng = np.random.default_rng((seed, classes))
    h = rng.normal(size=(*leading, features)).astype("float32")
    weight = rng.normal(size=(classes, features)).astype("float32") / 2
    bias = rng.normal(size=classes).astype("float32")
    labels = rng.integers(0, classes, leading)
    labels = np.where(rng.random(leading) < 0.2, -100, labels).astype("int32")
    weights = rng.random(leading).astype("float32")
    h, weight, bias = (jnp.asarray(a).astype(dtype) for a in (h, weight, bias))
    return h, weight, jnp.asarray(labels), bias, jnp.asarray(weights)


def relative(found, expected):
    found, expected = as_float64(found), as_float64(expected)
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def loss_and_gradients(loss, *arrays):
    places = tuple(range(len(arrays)))
    return jax.jit(jax.value_and_grad(lambda *a: loss(*a).sum(), places))(*arrays)
