"""The linear layer and its derivative: Y = X Wᵀ + B.

Read from top to bottom: the public function checks its arguments and settles
the dtype, the op computes, the rule differentiates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxlinear._checks import (
    check_shapes,
    checked_array,
    checked_backward_dtype,
    checked_reduce_dtype,
    compute_dtype,
)
from jaxlinear._plain import in_plain_autodiff, plain_linear
from jaxlinear._precision import Precision, check_support, checked_precision
from jaxlinear._products import (
    bias_gradient,
    forward_product,
    input_gradient,
    weight_gradient,
)
from jaxlinear._types import (
    cotangent_type,
    is_traced_with_explicit_axes,
    output_type,
    vary_together,
)


def linear(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike | Precision = None,
    backward_dtype: DTypeLike | None = None,
    reduce_dtype: DTypeLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Apply a linear layer to the last axis of ``x``: Y = X Wᵀ + B.

    Shapes::

        x (*, in)    weight (out, in)    bias (out,)    result (*, out)

    where ``*`` is any number of leading axes, none included. Given the cotangent
    G = ∂Loss/∂Y, reverse mode computes::

        ∇X = G W     ∇W = Gᵀ X     ∇B = Σ G

    with the leading axes contracted in ∇W and summed in ∇B. Each product is
    accumulated in at least float32 and rounded once: Y to ``dtype``, each gradient
    to the dtype of its own argument. GPUs alone round Y before the bias is added, too,
    as the naive formula does, unless ``reduce_dtype`` is float32: what is not rounded
    would be written to memory first. With float32 weights and ``dtype=bfloat16``
    the weight gradient therefore never passes through bfloat16. Reverse mode of any
    order is supported, and forward mode of a gradient (``jax.hessian``); forward mode
    of the layer itself needs :func:`jaxlinear.plain_autodiff`.

    The function is jitted. Its result has the checkpoint name ``"linear"``; the policy
    :func:`jaxlinear.save_linear_outputs` saves it.

    Args:
      x: input, with at least one axis. Integers are promoted as in ``jax.numpy``.
      weight: matrix (out, in), the layout of PyTorch.
      bias: vector (out,), or None. It is added in the dtype in which the product leaves
        its accumulator.
      dtype: floating or complex dtype of the product's operands and of the result.
        Default: the promoted dtype of the arguments.
      precision: precision of the products, as in :func:`jax.lax.dot_general`, or a
        :class:`jaxlinear.Precision` with one for each. TensorFloat32 is
        ``"tensorfloat32"``, or ``"TF32_TF32_F32"`` and ``"TF32_TF32_F32_X3"`` where
        the device must have it. Default: ``jax_default_matmul_precision``.
      backward_dtype: dtype to which G, ``x`` and ``weight`` are cast for ∇X = G W and
        ∇W = Gᵀ X. Default: ``dtype``. With ``dtype=float16``, bfloat16 keeps gradients
        that would overflow in float16 or be flushed to zero; with ``dtype=bfloat16``,
        float32 computes gradients from the unrounded arguments. G itself comes in
        ``dtype``, and each gradient leaves in the dtype of its argument. Or
        ``"alternative_float16"``: float16, with a hint to AMD GPUs (ROCm), some of
        which then multiply in bfloat16 inside. Not run on such hardware.
      reduce_dtype: dtype in which the products leave their accumulator, so the one in
        which partial sums are added across devices: the dtype of their operands,
        ``dtype`` or ``backward_dtype``, or its accumulator (float32 for bfloat16).
        Default: the dtype of each result, or the accumulator's where another rounding
        would follow: for a gradient of another dtype than the product's operands, and
        for Y with a bias, but not on GPUs. With float32 weights and ``dtype=bfloat16``,
        ``reduce_dtype=bfloat16`` halves the bytes that data parallelism sends, and
        rounds the weight gradient to bfloat16. The bias and its gradient stay as they
        are.
      out_sharding: sharding of the result on a mesh with explicit axes, as in
        :func:`jax.lax.dot_general`.

    Returns:
      Y, of shape (*, out) and dtype ``dtype``.

    Raises:
      ValueError: if the shapes are not those above, ``precision`` is unknown, or the
        device does not support it.
      TypeError: if an argument is no array, ``dtype`` or ``backward_dtype`` is neither
        floating nor complex, or is real while an argument is complex, or
        ``reduce_dtype`` is not one of the above.

    The formulas are those of ``torch.nn.Linear``:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html

    Example:
      >>> import jax, jax.numpy as jnp, jaxlinear
      >>> x, weight, bias = jnp.ones((8, 3)), jnp.ones((2, 3)), jnp.zeros(2)
      >>> jaxlinear.linear(x, weight, bias).shape
      (8, 2)
      >>> jax.grad(lambda w: jaxlinear.linear(x, w, bias).sum())(weight)
      Array([[8., 8., 8.],
             [8., 8., 8.]], dtype=float32)
    """
    # Not jitted in the switch: libraries that replace `lax.dot_general` must see every
    # call. Nor inside a program with explicit axes: XLA would gather a sharded weight
    # for the forward pass and again for the backward (tests/test_collectives.py).
    bare = in_plain_autodiff() or is_traced_with_explicit_axes(weight)
    apply = _checked_linear if bare else _jitted_linear
    if precision is not None:
        check_support(precision, x, weight)
    # As one static argument, since each costs time in every call.
    options = dtype, precision, backward_dtype, reduce_dtype, out_sharding
    return apply(x, weight, bias, options)


def _checked_linear(x, weight, bias, options):
    dtype, precision, backward_dtype, reduce_dtype, out_sharding = options
    x, weight = checked_array("x", x), checked_array("weight", weight)
    bias = None if bias is None else checked_array("bias", bias)
    check_shapes(x, weight, bias)
    dtype = compute_dtype(dtype, x, weight, bias)
    precision = checked_precision(precision)
    backward_dtype = checked_backward_dtype(backward_dtype, dtype)
    reduce_dtype = checked_reduce_dtype(reduce_dtype, dtype, backward_dtype[0])
    if in_plain_autodiff():
        return plain_linear(x, weight, bias, dtype, precision.forward, out_sharding)
    operands = vary_together(x, weight, bias)
    Y_type = output_type(dtype, precision.forward, reduce_dtype, bias, out_sharding)
    gradient_precisions = precision.input_grad, precision.weight_grad, None
    types = tuple(
        cotangent_type(a, backward_dtype, gradient_precision, reduce_dtype)
        for a, gradient_precision in zip(operands, gradient_precisions, strict=True)
    )
    return checkpoint_name(_linear(*operands, Y_type, types), "linear")


_jitted_linear = jax.jit(_checked_linear, static_argnums=3)

save_linear_outputs = jax.checkpoint_policies.save_only_these_names("linear")
"""A policy for ``jax.checkpoint``: save the result of every ``linear``, so that the
backward pass runs no forward product again, and recompute everything else."""


# The op: Y = X Wᵀ + B. Each product casts its operands inside it, so that the rule
# below decides in which dtype each gradient leaves its product.


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x, weight, bias, Y_type, gradient_types):
    return forward_product(x, weight, bias, Y_type)


# The rule. With y_no = Σ_i x_ni w_oi + b_o for each row n of the leading axes, and
# G = ∂Loss/∂Y, the chain rule gives
#
#     ∂Loss/∂x_ni = Σ_o g_no w_oi      ∇X = G W
#     ∂Loss/∂w_oi = Σ_n g_no x_ni      ∇W = Gᵀ X
#     ∂Loss/∂b_o  = Σ_n g_no           ∇B = Σ G
#
# ∇X reads W, ∇W reads X and ∇B neither, so each operand is kept only if the other
# one is differentiated, and it is kept in the dtype in which the rule multiplies it.


def _linear_forward(x, weight, bias, Y_type, gradient_types):
    X, W = x.value.astype(Y_type.dtype), weight.value.astype(Y_type.dtype)
    Y = forward_product(X, W, bias and bias.value, Y_type)
    backward_dtype = gradient_types[0].operand_dtype
    if backward_dtype != Y_type.dtype:
        X, W = x.value.astype(backward_dtype), weight.value.astype(backward_dtype)
    kept_X = X if weight.perturbed else _not_kept()
    kept_W = W if x.perturbed else _not_kept()
    return Y, (kept_X, kept_W)


def _linear_backward(Y_type, gradient_types, residuals, G):
    X, W = residuals
    X_type, W_type, B_type = gradient_types
    grad_X = input_gradient(G, W, X_type) if _is_kept(W) else None
    grad_W = weight_gradient(G, X, W_type) if _is_kept(X) else None
    grad_B = bias_gradient(G, B_type) if B_type else None
    return grad_X, grad_W, grad_B


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


# JAX may unpack the residuals of one set of perturbed arguments with the structure of
# another (see tests/test_caching.py). So the structure is always the same: in the place
# of an operand that is not kept is an empty array, of a dtype that no operand has.


def _not_kept():
    return jnp.zeros(0, bool)


def _is_kept(residual):
    return residual.dtype != bool
