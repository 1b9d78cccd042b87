"""The formulas: three products, each computed as its ``Product`` says, and a sum.

X is (*, in), W (out, in), B (out,), and G and Y are (*, out). Each function casts or
quantizes its operands, accumulates in at least float32, and rounds to the type that it
is given.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlinear._op.by_platform import visible_by_platform
from jaxlinear._op.multiply import multiply_arrays
from jaxlinear._op.operands import operand
from jaxlinear._op.quantized import multiply_quantized
from jaxlinear._op.sharding import ArrayType, rounded_over_devices
from jaxlinear._product import Product, accumulator_dtype


@jax.named_scope("forward_product")
def forward_product(X, W, B, product, Y_type):
    """Y = X Wᵀ + B. B is added in the dtype of the product's result."""
    if product.preferred_element_type is not None:
        return _forward_product(X, W, B, product, Y_type)
    return visible_by_platform(_ForwardProduct(product, Y_type), X, W, B)


class _ForwardProduct(NamedTuple):
    """Y where the platform decides if the product is rounded before B is added.

    TPUs and CPUs add B to the float32 product. XLA for GPUs would first write that to
    memory (tests/deep/targets), so there it is rounded.
    """

    product: Product
    Y_type: ArrayType

    platforms = "cuda", "rocm"

    def plain(self, *operands):
        return self._with_product_in(accumulator_dtype(self.Y_type.dtype), *operands)

    def on(self, platform, is_alone, *operands):
        is_gpu = platform in ("cuda", "rocm")
        wide = accumulator_dtype(self.Y_type.dtype)
        return self._with_product_in(self.Y_type.dtype if is_gpu else wide, *operands)

    def _with_product_in(self, dtype, X, W, B):
        product = self.product._replace(preferred_element_type=dtype)
        return _forward_product(X, W, B, product, self.Y_type)


def _forward_product(X, W, B, product, Y_type):
    Y = multiply(X, W, ((X.ndim - 1,), (1,)), product, Y_type.sharding)
    if B is not None:
        B = B.astype(product.preferred_element_type)
        Y = Y + jnp.expand_dims(B, range(Y.ndim - 1))
    return Y.astype(Y_type.dtype)


@jax.named_scope("input_gradient")
def input_gradient(G, W, product, X_type):
    """∇X = G W. Under `jax.vmap` W may be (..., out, in), and G then (*, ..., out)."""
    count = W.ndim - 1
    axes = tuple(range(G.ndim - count, G.ndim)), tuple(range(count))
    grad_X = multiply(G, W, axes, product, X_type.sharding, hint="grad_x")
    return round_to(X_type.dtype, grad_X)


@jax.named_scope("weight_gradient")
def weight_gradient(G, X, product, W_type):
    """∇W = Gᵀ X, with the leading axes contracted."""
    leading = tuple(range(G.ndim - 1))
    axes = leading, leading
    grad_W = multiply(G, X, axes, product, W_type.sharding, hint="grad_y")
    return round_to(W_type.dtype, grad_W)


@jax.named_scope("bias_gradient")
def bias_gradient(G, B_type):
    """∇B = Σ G, over every leading axis."""
    grad_B = jnp.sum(G, range(G.ndim - 1), dtype=accumulator_dtype(G.dtype))
    if B_type.sharding is not None:
        grad_B = jax.sharding.reshard(grad_B, B_type.sharding)
    if grad_B.dtype != B_type.dtype and jax.typeof(G).sharding.mesh.size > 1:
        grad_B = rounded_over_devices(grad_B, B_type.dtype)
    return round_to(B_type.dtype, grad_B)


def multiply(a, b, contracted_axes, product, sharding, hint=""):
    """The product of two arrays, or of operands made from them before."""
    a = operand(a, product, 0, contracted_axes[0])
    b = operand(b, product, 1, contracted_axes[1])
    if product.is_scaled:
        return multiply_quantized(a, b, contracted_axes, product, sharding)
    return multiply_arrays(a, b, contracted_axes, product, sharding, hint)


def round_to(dtype, cotangent):
    """``cotangent`` in ``dtype``: for a real dtype, the real part of a complex one."""
    if jnp.issubdtype(dtype, jnp.floating):
        cotangent = cotangent.real
    return cotangent.astype(dtype)
