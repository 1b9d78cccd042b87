"""The three products of the linear layer and its bias sum.

X is (*, in), W (out, in), B (out,), and G and Y are (*, out). Each function casts its
operands, accumulates in at least float32 and rounds to the type that it is given.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxlinear._cpu import cpu_product, has_form_on_cpu
from jaxlinear._types import accumulator, round_to


@jax.named_scope("forward_product")
def forward_product(X, W, B, Y_type):
    """Y = X Wᵀ + B. B is added in the dtype in which the product leaves."""

    def leaving_in(dtype):
        left = dataclasses.replace(Y_type, reduce_dtype=dtype)

        def forward(X, W, B):
            Y = _product(X, W, ((X.ndim - 1,), (1,)), left)
            if B is not None:
                Y = Y + jnp.expand_dims(B.astype(dtype), range(Y.ndim - 1))
            return Y.astype(Y_type.dtype)

        return forward

    if Y_type.reduce_dtype is not None:
        return leaving_in(Y_type.reduce_dtype)(X, W, B)
    # TPUs and CPUs add the bias before anything is rounded, at no cost. XLA for GPUs
    # would first write the float32 product to memory (tests/targets).
    rounded, wide = leaving_in(Y_type.dtype), leaving_in(accumulator(Y_type.dtype))
    return lax.platform_dependent(X, W, B, cuda=rounded, rocm=rounded, default=wide)


@jax.named_scope("input_gradient")
def input_gradient(G, W, X_type):
    """∇X = G W."""
    grad_X = _product(G, W, ((G.ndim - 1,), (0,)), X_type, hint="grad_x")
    return round_to(X_type.dtype, grad_X)


@jax.named_scope("weight_gradient")
def weight_gradient(G, X, W_type):
    """∇W = Gᵀ X, with the leading axes contracted."""
    leading = tuple(range(G.ndim - 1))
    grad_W = _product(G, X, (leading, leading), W_type, hint="grad_y")
    return round_to(W_type.dtype, grad_W)


@jax.named_scope("bias_gradient")
def bias_gradient(G, B_type):
    """∇B = Σ G, over every leading axis."""
    grad_B = jnp.sum(G, range(G.ndim - 1), dtype=accumulator(G.dtype))
    if B_type.sharding is not None:
        grad_B = jax.sharding.reshard(grad_B, B_type.sharding)
    if grad_B.dtype != B_type.dtype and jax.typeof(G).sharding.mesh.size > 1:
        # XLA for TPUs moves a cast, even one behind a barrier, before the sum over the
        # devices. This rounding stays where it is.
        bits = jnp.finfo(B_type.dtype)
        grad_B = lax.platform_dependent(
            grad_B,
            tpu=lambda grad_B: lax.reduce_precision(grad_B, bits.nexp, bits.nmant),
            default=lambda grad_B: grad_B,
        )
    return round_to(B_type.dtype, grad_B)


def _product(a, b, contracted_axes, product_type, hint=""):
    """The product of two arrays, in ``product_type.reduce_dtype``."""
    a, b = a.astype(product_type.operand_dtype), b.astype(product_type.operand_dtype)
    precision, sharding = product_type.precision, product_type.sharding
    dtype = product_type.reduce_dtype

    def plain(a, b):
        return lax.dot_general(
            a,
            b,
            (contracted_axes, ((), ())),
            precision=precision,
            preferred_element_type=dtype,
            out_sharding=sharding,
        )

    def on_accelerator(a, b):
        # XLA passes the hint to ROCm's libraries, which may then multiply float16 in
        # another way. Not run on such hardware.
        with set_xla_metadata(**{hint: "true"}):
            return plain(a, b)

    def on_cpu(a, b):
        return cpu_product(a, b, contracted_axes, precision, sharding).astype(dtype)

    default = on_accelerator if product_type.has_alternative_float16 else plain
    if not has_form_on_cpu(a, b, contracted_axes, precision):
        return plain(a, b)
    # Resolved when lowering: one exported program serves every platform.
    return lax.platform_dependent(a, b, cpu=on_cpu, default=default)
