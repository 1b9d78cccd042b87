"""The three products of the linear layer and its bias sum.

X is (*, in), W (out, in), B (out,), and G and Y are (*, out). Each function
accumulates in at least float32 and rounds once, to the type that it is given.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxlinear._types import round_to


def forward_product(X, W, B, Y_type):
    """Y = X Wᵀ + B."""
    Y = _accumulate(X, W, ((X.ndim - 1,), (1,)), Y_type.sharding)
    if B is not None:
        Y += jnp.expand_dims(B.astype(Y.dtype), range(Y.ndim - 1))
    return Y.astype(Y_type.dtype)


def input_gradient(G, W, X_type):
    """∇X = G W."""
    grad_X = _accumulate(G, W, ((G.ndim - 1,), (0,)), X_type.sharding)
    return round_to(X_type.dtype, grad_X)


def weight_gradient(G, X, W_type):
    """∇W = Gᵀ X, with the leading axes contracted."""
    leading = tuple(range(G.ndim - 1))
    grad_W = _accumulate(G, X, (leading, leading), W_type.sharding)
    return round_to(W_type.dtype, grad_W)


def bias_gradient(G, B_type):
    """∇B = Σ G, over every leading axis."""
    grad_B = jnp.sum(G, range(G.ndim - 1), dtype=_accumulator(G.dtype))
    if B_type.sharding is not None:
        grad_B = jax.sharding.reshard(grad_B, B_type.sharding)
    return round_to(B_type.dtype, grad_B)


def _accumulator(dtype):
    return jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype


def _accumulate(a, b, contracted_axes, out_sharding):
    """The product of two arrays of one dtype, in the dtype of its accumulator."""
    accumulator = _accumulator(a.dtype)

    def product(a, b):
        return lax.dot_general(
            a,
            b,
            (contracted_axes, ((), ())),
            preferred_element_type=accumulator,
            out_sharding=out_sharding,
        )

    if a.dtype == accumulator:
        return product(a, b)
    # On CPU a bfloat16 product with a float32 result can fail when it runs, where XLA
    # folds a transpose into it; an optimization barrier does not prevent that. See
    # test_transformations.py::test_transposed_gradients_in_mixed_precision.
    return lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: product(a.astype(accumulator), b.astype(accumulator)),
        default=product,
    )
