"""Rows: the loss of a last layer, which ours computes without the logits."""

import jax
import jax.numpy as jnp
import numpy as np
from transformations.losses import EVERY, directions

from jaxlinear import linear, linear_cross_entropy


def _labels(x, weight):
    """Every class, and -1 for a token that has no loss."""
    return np.arange(x[..., 0].size).reshape(x.shape[:-1]) % (weight.shape[0] + 1) - 1


def _losses(layer):
    def losses(x, weight, bias):
        labels = _labels(x, weight)
        if layer is linear:
            return linear_cross_entropy(x, weight, labels, bias, reduction="none")
        z = layer(x, weight, bias).astype(weight.dtype)
        of_label = jnp.take_along_axis(z, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return jnp.where(labels < 0, 0, jax.nn.logsumexp(z, -1) - of_label)

    return losses


def _mean(layer):
    def mean(x, weight, bias):
        labels = _labels(x, weight)
        if layer is linear:
            return linear_cross_entropy(x, weight, labels, bias)
        return jnp.sum(_losses(layer)(x, weight, bias)) / float(np.sum(labels >= 0))

    return mean


def gradient_of_the_mean_loss_of_a_last_layer(layer, *arrays):
    return jax.jit(jax.value_and_grad(_mean(layer), EVERY))(*arrays)


def jvp_of_the_mean_loss_of_a_last_layer(layer, *arrays):
    return jax.jvp(_mean(layer), arrays, directions(*arrays))


def hessian_vector_product_of_the_mean_loss_of_a_last_layer(layer, *arrays):
    gradient = jax.grad(_mean(layer), EVERY)
    return jax.jvp(gradient, arrays, directions(*arrays))


def vjp_of_the_losses_of_a_last_layer(layer, *arrays):
    losses, vjp = jax.vjp(_losses(layer), *arrays)
    return losses, vjp(jnp.cos(losses))


def vmap_of_the_gradient_of_the_losses_of_a_last_layer(layer, *arrays):
    def gradient(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(_losses(layer)(*a))), EVERY)(*arrays)

    return jax.vmap(gradient, (1, None, None))(*arrays)
