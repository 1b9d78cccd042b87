"""Rows: ``jax.vmap``."""

import jax
import jax.numpy as jnp
from transformations.losses import EVERY, loss


def _stack(a, axis=0):
    return jnp.stack([a, 2 * a, -a], axis)


def vmap_over_x(layer, x, weight, bias):
    return jax.vmap(layer, (1, None, None), 1)(x, weight, bias)


def vmap_over_weight(layer, x, weight, bias):
    return jax.vmap(layer, (None, 2, None), 1)(x, _stack(weight, 2), bias)


def vmap_over_bias(layer, x, weight, bias):
    return jax.vmap(layer, (None, None, 1))(x, weight, _stack(bias, 1))


def vmap_over_every_argument(layer, x, weight, bias):
    stacked = _stack(x, 3), _stack(weight, 1), _stack(bias)
    return jax.vmap(layer, (3, 1, 0), -1)(*stacked)


def vmap_nested(layer, x, weight, bias):
    inner = jax.vmap(layer, (1, None, None))
    return jax.vmap(inner, (None, 0, 0))(x, _stack(weight), _stack(bias))


def vmap_of_grad(layer, x, weight, bias):
    gradients = jax.grad(loss(layer), EVERY)
    per_example = jax.vmap(gradients, (0, None, None))(x, weight, bias)
    stacked = _stack(weight), _stack(bias)
    return per_example, jax.vmap(gradients, (None, 0, 0))(x, *stacked)


def grad_of_vmap(layer, x, weight, bias):
    def batched(x, weights, bias):
        return jnp.sum(jax.vmap(loss(layer), (None, 0, None))(x, weights, bias))

    return jax.grad(batched, EVERY)(x, _stack(weight), bias)


def vmap_with_collectives(layer, x, weight, bias):
    def mean_gradient(x):
        gradients = jax.grad(loss(layer), (1, 2))(x, weight, bias)
        return jax.lax.pmean(gradients, "batch")

    return jax.vmap(mean_gradient, axis_name="batch")(x)
