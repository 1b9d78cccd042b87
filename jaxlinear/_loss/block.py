"""A block of logits: the loss, its gradient G, and the three formulas."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear._loss.logits import (
    Statistics,
    filled_as,
    logits,
    rounded,
    rows_of,
    scale_for_float16,
)
from jaxlinear._op.formulas import bias_gradient, input_gradient, weight_gradient
from jaxlinear._op.sharding import ArrayType
from jaxlinear._product import Products


class Loss(NamedTuple):
    """A loss of a token, by what it reads of the logits z of a vocabulary of v.

    With ε, ζ: log Σ exp z - (1 - ε) z_label - ε / v Σ z + ζ (log Σ exp z)².
    """

    label_smoothing: float
    z_loss: float

    def __call__(self, read, labels, size):
        ε, ζ = self.label_smoothing, self.z_loss
        loss = read.log_sum_exp - (1 - ε) * read.label
        if read.total is not None:
            loss -= ε / size * read.total
        if ζ:
            loss += ζ * read.log_sum_exp**2
        return jnp.where(labels >= 0, loss, 0)

    def derivative(self, read, labels, size):
        """The derivative by what is read."""
        ε, ζ = self.label_smoothing, self.z_loss
        of_lse = 1 + 2 * ζ * read.log_sum_exp if ζ else 1.0

        def counted(value):
            return jnp.where(labels >= 0, value, 0).astype(read.log_sum_exp.dtype)

        total = None if read.total is None else counted(-ε / size)
        return Statistics(counted(of_lse), counted(ε - 1), total, prediction=None)


class Spec(NamedTuple):
    """The static argument of both ops. It has a hash, being a key of JAX's caches."""

    products: Products
    dtypes: tuple[np.dtype, np.dtype, np.dtype | None]  # Of h, weight and bias.
    soft_cap: float | None
    reads_total: bool
    predicts: bool
    loss: Loss
    axes: tuple[str, ...]  # Of `jax.shard_map`, over which the vocabulary is split.

    @property
    def dtype(self):
        """That of the logits and of all sums: float32 at least."""
        return self.products.forward.preferred_element_type

    def logits(self, X, W, B):
        return logits(X, W, B, self.products.forward, self.soft_cap)

    def rows_of(self, z, labels, first):
        return rows_of(z, labels, first, self.reads_total, self.predicts)

    def first_of(self, W):
        """The number in the vocabulary of the first class of a device."""
        return lax.axis_index(self.axes) * W.shape[0] if self.axes else 0

    def classes(self, W):
        return W.shape[0] * (lax.axis_size(self.axes) if self.axes else 1)

    def losses(self, read, labels, W):
        return self.loss(read, labels, self.classes(W))


def with_derivatives_in_float32(function, spec, *arrays):
    """``function(spec, *arrays)``, of which no derivative has operands in float16.

    The scale that keeps G in the range of float16 would take its derivatives out of it.
    """
    wide = [
        p._replace(dtype=spec.dtype) if p.operand_dtype == jnp.float16 else p
        for p in spec.products
    ]
    if wide == [*spec.products]:
        return function(spec, *arrays)
    apply = jax.custom_jvp(partial(function, spec))

    @apply.defjvp
    def _(primals, tangents):
        in_float32 = spec._replace(products=Products(*wide))
        return jax.jvp(partial(function, in_float32), primals, tangents)

    return apply(*arrays)


# The rule. With z_nv = Σ_i h_ni w_vi + b_v for each row n, p = softmax(z), and the
# derivative g of the loss by what it reads of a row,
#
#     ∂Loss/∂z_nv = g_lse p_nv + g_label [v = label_n] + g_total
#
# which is G in the three formulas of the linear layer. It exists for a block only.


class Gradients(NamedTuple):
    """The gradients of h, weight and bias, None if it is not differentiated."""

    X: Any
    W: Any
    B: Any


def gradients_of_block(G, X, W, wanted, spec):
    """∇X = G W, ∇W = Gᵀ X and ∇B = Σ G of a block, in float32 at least."""
    _, input_grad, weight_grad = spec.products
    wide = ArrayType(spec.dtype, None)
    grad_X = grad_W = grad_B = None
    if wanted.X is not None:
        grad_X = input_gradient(_rounded(G, input_grad), W, input_grad, wide)
    if wanted.W is not None:
        grad_W = weight_gradient(_rounded(G, weight_grad), X, weight_grad, wide)
    if wanted.B is not None:
        grad_B = bias_gradient(G, wide)
    return Gradients(grad_X, grad_W, grad_B)


def no_gradients(wanted, X, W, dtype):
    shapes = Gradients(X.shape, W.shape, W.shape[:1])
    return Gradients(
        *(
            None if is_wanted is None else filled_as(X, shape, 0, dtype)
            for is_wanted, shape in zip(wanted, shapes, strict=True)
        )
    )


class Left(NamedTuple):
    """What is rounded away from G at the label (*), for each product, or None.

    There G is p - 1, close under -1, where bfloat16 has three digits: one number a row
    makes up most of the error of both products. It is put back in float32.
    """

    X: jax.Array | None
    W: jax.Array | None


def left_at_label(g_label, spec):
    _, *products = spec.products
    return Left(
        *(
            None if p.operand_dtype == spec.dtype else g_label - _rounded(g_label, p)
            for p in products
        )
    )


def with_left(gradients, left, X, W, labels, spec):
    _, input_grad, weight_grad = spec.products
    grad_X, grad_W, _ = gradients
    places = labels - spec.first_of(W)
    is_here = (labels >= 0) & (places >= 0) & (places < W.shape[0])
    if grad_X is not None and left.X is not None:
        rows = jnp.take(W, jnp.where(is_here, places, 0), axis=0)
        its_left = jnp.where(is_here, left.X, 0)[..., None]
        grad_X += its_left * _as_operand(rows, input_grad, spec)
    if grad_W is not None and left.W is not None:
        update = left.W[..., None] * _as_operand(X, weight_grad, spec)
        places = jnp.where(is_here, places, W.shape[0])
        grad_W = grad_W.at[places].add(update, mode="drop")
    return gradients._replace(X=grad_X, W=grad_W)


def _rounded(G, product):
    return rounded(G, product.operand_dtype)


def _as_operand(array, product, spec):
    return array.astype(product.operand_dtype).astype(spec.dtype)


def shared_operand(array, spec):
    """What all products of a walk read, or the array where they read several dtypes."""
    dtypes = {product.operand_dtype for product in spec.products}
    return array.astype(*dtypes) if len(dtypes) == 1 else array


def scaled(g, spec):
    """``g`` times a power of two for float16, and the inverse of that, or None."""
    _, *gradients = spec.products
    if all(product.operand_dtype != jnp.float16 for product in gradients):
        return g, None
    scale = scale_for_float16(g)
    return times(scale, g), 1 / scale


def times(scale, gradients):
    if scale is None:
        return gradients
    return jax.tree.map(lambda a: a * scale, gradients)


def wanted_gradients(h, weight, bias):
    primals = (h, weight, bias)
    return Gradients(*(() if p is not None and p.perturbed else None for p in primals))


def in_dtypes(spec, gradients):
    """Each gradient in the dtype of its argument."""
    return [
        None if found is None else found.astype(dtype)
        for found, dtype in zip(gradients, spec.dtypes, strict=True)
    ]
