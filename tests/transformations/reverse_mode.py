"""Rows: derivatives in reverse mode, and forward mode of those."""

import jax
import jax.numpy as jnp
from transformations.losses import EVERY, directions, loss


def grad(layer, *arrays):
    return jax.grad(loss(layer), EVERY)(*arrays)


def value_and_grad(layer, *arrays):
    return jax.value_and_grad(loss(layer), EVERY)(*arrays)


def grad_with_respect_to_one_argument_at_a_time(layer, *arrays):
    return [jax.grad(loss(layer), i)(*arrays) for i in EVERY]


def grad_without_bias(layer, x, weight, bias):
    return jax.grad(lambda x, w: loss(layer)(x, w, None), (0, 1))(x, weight)


def vjp(layer, *arrays):
    Y, pull_back = jax.vjp(layer, *arrays)
    return Y, pull_back(jnp.cos(Y))


def jacrev(layer, *arrays):
    return jax.jacrev(layer, EVERY)(*arrays)


def hessian(layer, *arrays):
    return jax.hessian(loss(layer), (1, 2))(*arrays)


def hessian_vector_product_forward_over_reverse(layer, *arrays):
    gradient = jax.grad(loss(layer), EVERY)
    return jax.jvp(gradient, arrays, directions(*arrays))[1]


def hessian_vector_product_reverse_over_reverse(layer, *arrays):
    gradient = jax.grad(loss(layer), EVERY)
    return jax.vjp(gradient, *arrays)[1](directions(*arrays))
