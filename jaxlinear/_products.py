"""The three products of the linear layer and its bias sum.

X is (*, in), W (out, in), B (out,), and G and Y are (*, out). Each function
accumulates in at least float32 and rounds to the type that it is given.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._cpu import cpu_product
from jaxlinear._types import accumulator, round_to


def forward_product(X, W, B, Y_type):
    """Y = X Wᵀ + B."""
    Y = _product(X, W, ((X.ndim - 1,), (1,)), Y_type)
    if B is not None:
        wide = accumulator(Y_type.dtype)
        Y = Y.astype(wide) + jnp.expand_dims(B.astype(wide), range(Y.ndim - 1))
    return Y.astype(Y_type.dtype)


def input_gradient(G, W, X_type):
    """∇X = G W."""
    grad_X = _product(G, W, ((G.ndim - 1,), (0,)), X_type)
    return round_to(X_type.dtype, grad_X)


def weight_gradient(G, X, W_type):
    """∇W = Gᵀ X, with the leading axes contracted."""
    leading = tuple(range(G.ndim - 1))
    grad_W = _product(G, X, (leading, leading), W_type)
    return round_to(W_type.dtype, grad_W)


def bias_gradient(G, B_type):
    """∇B = Σ G, over every leading axis."""
    grad_B = jnp.sum(G, range(G.ndim - 1), dtype=accumulator(G.dtype))
    if B_type.sharding is not None:
        grad_B = jax.sharding.reshard(grad_B, B_type.sharding)
    return round_to(B_type.dtype, grad_B)


def _product(a, b, contracted_axes, result_type):
    """The product of two arrays of one dtype, in ``result_type.reduce_dtype``."""
    dtype, sharding = result_type.reduce_dtype, result_type.sharding

    def plain(a, b):
        return lax.dot_general(
            a,
            b,
            (contracted_axes, ((), ())),
            preferred_element_type=dtype,
            out_sharding=sharding,
        )

    def on_cpu(a, b):
        return cpu_product(a, b, contracted_axes, sharding).astype(dtype)

    if a.dtype == accumulator(a.dtype):
        return plain(a, b)
    # Resolved when lowering: one exported program serves every platform.
    return lax.platform_dependent(a, b, cpu=on_cpu, default=plain)
