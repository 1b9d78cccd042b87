"""Rows: derivatives in forward mode. Ours need ``jaxlinear.plain_autodiff``."""

import jax
import jax.numpy as jnp
from jax import lax
from table.losses import EVERY, directions, loss


def jvp(layer, *arrays):
    return jax.jvp(layer, arrays, directions(*arrays))


def linearize(layer, *arrays):
    Y, push_forward = jax.linearize(layer, *arrays)
    return Y, push_forward(*directions(*arrays))


def jacfwd(layer, *arrays):
    return jax.jacfwd(layer, EVERY)(*arrays)


def hessian_vector_product_reverse_over_forward(layer, *arrays):
    def derivative(*arrays_):
        return jax.jvp(loss(layer), arrays_, directions(*arrays))[1]

    return jax.grad(derivative, EVERY)(*arrays)


def hessian_vector_product_forward_over_forward(layer, *arrays):
    """One number, vᵀHv."""

    def derivative(*arrays_):
        return jax.jvp(loss(layer), arrays_, directions(*arrays))[1]

    return jax.jvp(derivative, arrays, directions(*arrays))


def jvp_of_vmap(layer, *arrays):
    return jax.jvp(jax.vmap(layer, (0, None, None)), arrays, directions(*arrays))


def jvp_of_while_loop(layer, x, weight, bias):
    def repeated(x):
        def step(state):
            i, x = state
            return i + 1, jnp.sin(layer(x, weight[:, :8] / 4, bias)).astype(x.dtype)

        return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    x = x[..., :8]
    return jax.jvp(repeated, (x,), directions(x))


def linear_transpose(layer, x, weight, bias):
    def of_x(x):
        return layer(x, weight)

    Y = of_x(x)
    return jax.linear_transpose(of_x, x)(jnp.cos(Y))
