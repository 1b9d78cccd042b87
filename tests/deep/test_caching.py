"""Reverse mode in any order of calls, with JAX's caches of traced programs in use.

JAX keeps one residual structure for all the ways in which a program that it has traced
once is differentiated. A rule whose residuals differ in structure between them gets the
residuals of another call, in another place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import naive, random_array

from jaxlinear import linear

LAYERS, WIDTH = 3, 4


def apply_layers(layer, parameters, x, frozen):
    for i, (weight, bias) in enumerate(parameters):
        if i in frozen:
            weight, bias = lax.stop_gradient((weight, bias))
        x = jnp.tanh(layer(x, weight, bias))
    return x


def as_it_is(layer):
    return layer


def scanned_once(layer):
    def apply(x, weight, bias):
        return lax.scan(lambda x, _: (layer(x, weight, bias), None), x, length=1)[0]

    return apply


@functools.cache  # One function for each, as in a program that is written once.
def gradients(wrapped, layer):
    layer = wrapped(layer)

    def loss(parameters, x, frozen):
        return jnp.sum(apply_layers(layer, parameters, x, frozen) ** 2)

    return jax.grad(loss, (0, 1)), jax.grad(loss, 0), jax.grad(loss, 1)


@pytest.mark.parametrize("wrapped", [as_it_is, jax.jit, jax.checkpoint, scanned_once])
def test_gradients_do_not_depend_on_what_was_differentiated_before(wrapped):
    parameters = [
        (
            random_array((i, 0), (WIDTH, WIDTH), "float32"),
            random_array(i, WIDTH, "float32"),
        )
        for i in range(LAYERS)
    ]
    x = random_array(9, (WIDTH, WIDTH), "float32")  # Of the weight's shape.
    choices = np.random.default_rng(0)
    for _ in range(10):
        which = choices.integers(3)
        frozen = tuple(np.flatnonzero(choices.integers(2, size=LAYERS)))
        ours = gradients(wrapped, linear)[which](parameters, x, frozen)
        reference = gradients(as_it_is, naive)[which](parameters, x, frozen)
        for actual, expected in zip(
            *map(jax.tree.leaves, (ours, reference)), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
