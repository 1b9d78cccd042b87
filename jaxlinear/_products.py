"""The three products of the linear layer and its bias sum.

X is (*, in), W (out, in), B (out,), and G and Y are (*, out). Each function
accumulates in at least float32 and rounds to the type that it is given.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

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

    def product(a, b, dtype):
        return lax.dot_general(
            a,
            b,
            (contracted_axes, ((), ())),
            preferred_element_type=dtype,
            out_sharding=result_type.sharding,
        )

    def plain(a, b):
        return product(a, b, result_type.reduce_dtype)

    def on_cpu(a, b):
        return _fenced(product)(a, b).astype(result_type.reduce_dtype)

    if a.dtype == accumulator(a.dtype):
        return plain(a, b)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=plain)


def _fenced(product):
    """``product`` of low-precision operands, fast and safe on XLA's CPU backend.

    With a float32 result it is faster than with one of the operands' dtype, but fails
    when it runs where XLA has folded a transpose into it. The barrier keeps out those
    of the result; `jax.vmap` over one operand puts one inside. There, and where JAX
    differentiates the product, the operands are widened: slower, and never fails. The
    operands of the fast form stay as they come, so that the products of the forward and
    of the backward pass share the gathered copy of a sharded one. See
    tests/test_products.py and tests/test_collectives.py.
    """

    def widened(a, b):
        wide = accumulator(a.dtype)
        return product(a.astype(wide), b.astype(wide), wide)

    @custom_vmap
    def fenced(a, b):
        return lax.optimization_barrier(product(a, b, accumulator(a.dtype)))

    @fenced.def_vmap
    def _(axis_size, is_batched, a, b):
        axes = [0 if batched else None for batched in is_batched]
        return jax.vmap(widened, axes)(a, b), True

    differentiable = jax.custom_jvp(fenced)

    @differentiable.defjvp
    def _(primals, tangents):
        return jax.jvp(widened, primals, tangents)

    return differentiable
