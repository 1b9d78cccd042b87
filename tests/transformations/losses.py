"""What the rows differentiate."""

import jax.numpy as jnp

EVERY = (0, 1, 2)  # The arguments: x, weight and bias.


def loss(layer, **options):
    """A function of x, weight and bias whose second derivatives are not zero."""

    def sum_of_squares(x, weight, bias):
        return jnp.sum(layer(x, weight, bias, **options).astype(weight.dtype) ** 2)

    return sum_of_squares


def directions(*arrays):
    """Tangents: one value for each, of no symmetry."""
    return tuple(jnp.cos(a) + a / 2 for a in arrays)
