"""Rows: kinds of values, and JAX's settings."""

import jax
import jax.numpy as jnp
from transformations.losses import EVERY, loss


def one_axis(layer, x, weight, bias):
    return jax.grad(loss(layer), EVERY)(x[0, 0], weight, bias)


def four_axes(layer, x, weight, bias):
    return jax.grad(loss(layer), EVERY)(jnp.stack([x, -x]), weight, bias)


def no_rows(layer, x, weight, bias):
    return jax.grad(loss(layer), EVERY)(x[:0], weight, bias)


def no_input_features(layer, x, weight, bias):
    return jax.grad(loss(layer), EVERY)(x[..., :0], weight[:, :0], bias)


def no_output_features(layer, x, weight, bias):
    return jax.grad(loss(layer), EVERY)(x, weight[:0], bias[:0])


def complex_numbers(layer, *arrays):
    def modulus(*arrays):
        return jnp.sum(jnp.abs(layer(*arrays)) ** 2)

    arrays = [jax.lax.complex(a, a[::-1] / 2) for a in arrays]
    return jax.grad(modulus, EVERY)(*arrays)


def float8_input(layer, x, weight, bias):
    gradients = jax.grad(loss(layer, dtype=weight.dtype), EVERY)
    return gradients(x.astype("float8_e4m3fn"), weight, bias)


def float8_weight(layer, x, weight, bias):
    def sum_of_squares(x, weight, bias):
        return jnp.sum(layer(x, weight, bias, dtype=x.dtype) ** 2)

    return jax.grad(sum_of_squares, EVERY)(x, weight.astype("float8_e5m2"), bias)


def x64(layer, *arrays):
    with jax.enable_x64(True):
        arrays = [a.astype("float64") for a in arrays]
        return jax.grad(loss(layer), EVERY)(*arrays)


def debug_nans(layer, *arrays):
    with jax.debug_nans(True):
        return jax.jit(jax.grad(loss(layer), EVERY))(*arrays)


def leak_checking(layer, *arrays):
    with jax.check_tracer_leaks(True):
        return jax.jit(jax.grad(loss(layer), EVERY))(*arrays)


def strict_dtype_promotion(layer, *arrays):
    with jax.numpy_dtype_promotion("strict"):
        return jax.grad(loss(layer), EVERY)(*arrays)


def strict_rank_promotion(layer, *arrays):
    with jax.numpy_rank_promotion("raise"):
        return jax.grad(loss(layer), EVERY)(*arrays)
