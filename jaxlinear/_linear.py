"""The linear layer and its derivative: Y = X Wᵀ + B.

Read from top to bottom: the public function checks its arguments and settles
the dtype, the op computes, the rule differentiates.
"""

from functools import partial
from inspect import unwrap
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlinear._checks import (
    ArrayLike,
    check_shapes,
    checked_arrays,
    checked_dtype,
    compute_dtype,
)
from jaxlinear._formulas import (
    bias_gradient,
    forward_product,
    input_gradient,
    weight_gradient,
)
from jaxlinear._linear_map import LinearMap, Term, linear_map, linear_map_p
from jaxlinear._plain import is_plain, plain_linear
from jaxlinear._product import Precision, Products, accumulator
from jaxlinear._product_checks import checked_products
from jaxlinear._product_checks import with_defaults as completed
from jaxlinear._quantized import as_operand, as_shared_operand, kept_operand
from jaxlinear._sharding import (
    ArrayType,
    broadcast_over_rows,
    cotangent_type,
    is_traced_with_explicit_axes,
    vary_together,
)


def linear(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    products: Products | None = None,
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
    as the naive formula does, unless the forward product is asked to leave in float32:
    what is not rounded would be written to memory first. With float32 weights and
    ``dtype=bfloat16`` the weight gradient therefore never passes through bfloat16.
    Forward mode computes, of tangents dX, dW and dB::

        dY = dX Wᵀ + X dWᵀ + dB

    as the forward product is computed, with float32 sums that are rounded once, no
    product for an argument without a tangent, and no tangent in 8 bits. X and W are
    what is kept for reverse mode, so they have no more bits there than the operands of
    a gradient. Both modes may be combined to any order, and ``jax.linear_transpose``
    takes the layer as a function of ``x``.

    The function is jitted. Its result has the checkpoint name ``"linear"``; the policy
    :func:`jaxlinear.save_linear_outputs` saves it.

    Args:
      x: input, with at least one axis. Like the others whatever ``jnp.asarray`` takes,
        but no list. Integers are promoted as in ``jax.numpy``; where all arguments are
        integers, so is Y, and there is no gradient.
      weight: matrix (out, in), the layout of PyTorch.
      bias: vector (out,), or None. It is added in the dtype in which the product leaves
        its accumulator.
      dtype: floating or complex dtype of the products' operands and of the result, of
        16 bits or more. Default: the promoted dtype of the arguments.
      precision: precision of the three products, as in :func:`jax.lax.dot_general`.
        TensorFloat32 is ``"tensorfloat32"``, or ``"TF32_TF32_F32"`` and
        ``"TF32_TF32_F32_X3"`` where the device must have it. Default:
        ``jax_default_matmul_precision``.
      products: what one product has for itself, where it is not what ``dtype`` and
        ``precision`` say for all three. ``Products(weight_grad=Product(...))`` with

        - ``precision="highest"`` computes the weight gradient with all bits;
        - ``dtype=float32``, under ``dtype=bfloat16``, from the unrounded arguments;
          G itself comes in ``dtype``;
        - ``dtype=bfloat16``, under ``dtype=float16``, keeps gradients that would
          overflow in float16 or be flushed to zero;
        - ``preferred_element_type=bfloat16``, under ``dtype=bfloat16``, halves the
          bytes that data parallelism sends, and rounds the gradient to bfloat16;
        - a ``dtype`` of 8 bits multiplies scaled operands, from the arguments as they
          came. :data:`jaxlinear.FLOAT8`, :data:`jaxlinear.FLOAT8_E4M3` and
          :data:`jaxlinear.INT8` have it in all three. What the gradients multiply is
          kept in 8 bits, through which there is no second derivative.

        Each gradient leaves in the dtype of its argument. The bias and its gradient
        stay as they are.
      out_sharding: sharding of the result on a mesh with explicit axes, as in
        :func:`jax.lax.dot_general`.

    Returns:
      Y, of shape (*, out) and dtype ``dtype``.

    Raises:
      ValueError: if the shapes are not those above, a precision is unknown, or no
        platform multiplies the 8-bit operands that a product asks for.
      TypeError: if an argument is no array, a dtype is neither floating nor complex, or
        has less than 16 bits, or is real while an argument is complex, or a product
        cannot have the ``preferred_element_type`` that was asked for; or if a second
        derivative is asked for of what is kept in 8 bits.

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
    x, weight, bias = checked_arrays(x, weight, bias)
    # What is left out costs no time in a call.
    options = {}
    if dtype is not None:
        options["dtype"] = dtype = checked_dtype("dtype", dtype)
    if products is not None or precision is not None:
        options["products"] = checked_products(products, precision, dtype)
    if out_sharding is not None:
        options["out_sharding"] = out_sharding
    # Not jitted where it is the naive formula: libraries that replace
    # `lax.dot_general` must see every call. Nor in a program with explicit axes: XLA
    # would gather a sharded weight for the forward pass and again for the backward
    # (tests/test_collectives.py).
    bare = is_plain() or is_traced_with_explicit_axes(weight)
    apply = _apply if bare else _apply_jitted
    return apply(x, weight, bias, **options)


def _apply(x, weight, bias, *, dtype=None, products=None, out_sharding=None):
    check_shapes(x, weight, bias)
    dtype = compute_dtype(dtype, x, weight, bias)
    products = completed(products, dtype, x, weight, bias)
    if is_plain() or not jnp.issubdtype(dtype, jnp.inexact):
        precision = products.forward.precision
        return plain_linear(x, weight, bias, dtype, precision, out_sharding)
    operands = vary_together(x, weight, bias)
    gradient_types = tuple(map(cotangent_type, operands))
    Y_type = ArrayType(dtype, out_sharding)
    return _linear_in_every_mode(*operands, products, Y_type, gradient_types)


_apply_jitted = jax.jit(_apply, static_argnames=("dtype", "products", "out_sharding"))

# The op: Y = X Wᵀ + B. Each product casts its operands inside it, so that the rule
# below decides in which dtype each gradient leaves its product.


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear(x, weight, bias, products, Y_type, gradient_types):
    return forward_product(x, weight, bias, products.forward, Y_type)


# The rule. With y_no = Σ_i x_ni w_oi + b_o for each row n of the leading axes, and
# G = ∂Loss/∂Y, the chain rule gives
#
#     ∂Loss/∂x_ni = Σ_o g_no w_oi      ∇X = G W
#     ∂Loss/∂w_oi = Σ_n g_no x_ni      ∇W = Gᵀ X
#     ∂Loss/∂b_o  = Σ_n g_no           ∇B = Σ G
#
# ∇X reads W, ∇W reads X and ∇B neither, so each operand is kept only if the other
# one is differentiated, and it is kept as the rule multiplies it: in the dtype of that
# product, and with its scale where that has 8 bits.


def _linear_forward(x, weight, bias, products, Y_type, gradient_types):
    forward, input_grad, weight_grad = products
    *leading, last = range(x.value.ndim)
    X = as_operand(x.value, forward, 0, (last,))
    W = as_operand(weight.value, forward, 1, (1,))
    Y = forward_product(X, W, bias and bias.value, forward, Y_type)
    X = kept_operand(x.value, X, weight_grad, (*leading,)) if weight.perturbed else None
    W = kept_operand(weight.value, W, input_grad, (0,)) if x.perturbed else None
    return Y, (X, W)


def _linear_backward(products, Y_type, gradient_types, residuals, G):
    X, W = residuals
    _, input_grad, weight_grad = products
    X_type, W_type, B_type = gradient_types
    grad_B = None if B_type is None else bias_gradient(G, B_type)
    G = as_shared_operand(G, input_grad, weight_grad)
    grad_X = None if W is None else input_gradient(G, W, input_grad, X_type)
    grad_W = None if X is None else weight_gradient(G, X, weight_grad, W_type)
    return grad_X, grad_W, grad_B


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


# Every mode. The layer is a linear map of x and B, which can be transposed. Its
# differential dY = dX Wᵀ + X dWᵀ + dB is one of the tangents, and that one's transpose
# is the rule above. `_linear_map.py` is how JAX is told so.


def _linear_in_every_mode(x, weight, bias, *statics):
    layer = _map(_layer, statics, _derivative)
    return linear_map(layer, (None, weight, None), (x, None, bias))


def _derivative(statics, primals, tangents):
    ((_, weight, _), (x, _, bias)), ((_, dW, _), (dX, _, dB)) = primals, tangents
    Y, residuals = _linear_forward(
        CustomVJPPrimal(x, dX is not None),
        CustomVJPPrimal(weight, dW is not None),
        bias if bias is None else CustomVJPPrimal(bias, dB is not None),
        *statics,
    )
    Y = checkpoint_name(Y, "linear")
    # Where a bias is mapped, Y is, and then so must be what its cotangent comes to.
    is_alone = dB is None or (dX is None and dW is None)
    rows = lax.stop_gradient(Y)[..., :0] if bias is not None and is_alone else None
    return Y, linear_map(_map(_differential, statics), (*residuals, rows), (dX, dW, dB))


def _layer(statics, residuals, operands):
    (_, weight, _), (x, _, bias) = residuals, operands
    # Without the rule, which is the differential's: interpreters see the formula alone.
    return unwrap(_linear)(x, weight, bias, *statics)


def _differential(statics, residuals, tangents):
    """dY, as the forward product is computed, and rounded once."""
    (forward, *_), Y_type, _ = statics
    (X, W, rows), (dX, dW, dB) = residuals, tangents
    if forward.is_scaled:  # Tangents are not quantized.
        forward = forward._replace(dtype=Y_type.dtype, scaling=None)
    if dX is not None and dW is not None:
        wide = Y_type._replace(dtype=accumulator(Y_type.dtype))
        kept = forward._replace(
            preferred_element_type=accumulator(forward.operand_dtype)
        )
        dY = forward_product(dX, W, dB, kept, wide)
        dY += forward_product(X, dW, None, kept, wide)
        return dY.astype(Y_type.dtype)
    if dX is not None:
        return forward_product(dX, W, dB, forward, Y_type)
    if dW is not None:
        return forward_product(X, dW, dB, forward, Y_type)
    return broadcast_over_rows(dB.astype(Y_type.dtype), rows)


def _transposed(statics, residuals, G):
    (X, W, _), (products, Y_type, gradient_types) = residuals, statics
    if G.dtype != Y_type.dtype:  # A sum over what is mapped, which has more bits.
        products = Products(*(_of_wide(p, G.dtype) for p in products))
    return _linear_backward(products, Y_type, gradient_types, (X, W), G)


def _of_wide(product, dtype):
    own = product.dtype if product.is_scaled else dtype
    return product._replace(dtype=own, preferred_element_type=dtype)


def _map(apply, statics, derivative=None):
    """A map of the residuals X, W and rows, and of the operands or tangents X, W and B.

    The rows are an empty array (*, 0), with the leading axes where no other has them.
    """
    products, _, gradient_types = statics
    # A sharding is one of so many leading axes, and no more; a scale of one tensor.
    has_rows = not any(t and t.sharding for t in gradient_types)
    has_rows &= not any(p.scaling == "per_tensor" for p in products)
    terms = Term(residual=1, cotangent_axis=-2), Term(residual=0), Term(residual=None)
    leading = has_rows, False, has_rows, has_rows, False, False
    return LinearMap(apply, _transposed, terms, leading, statics, derivative)


_named = jax.checkpoint_policies.save_only_these_names("linear")


def save_linear_outputs(primitive: Primitive, *types: Any, **parameters: Any) -> bool:
    """A policy for ``jax.checkpoint`` that saves the result of every ``linear``.

    The backward pass then runs no forward product again, and recomputes everything
    else. It is ``save_only_these_names("linear")``, but for layers that are not
    differentiated, which have no name.

    Args:
      primitive: the operation that JAX asks about; it calls the policy, not the user.
      *types: the types of its operands.
      **parameters: its parameters.

    Returns:
      Whether the result of the operation is saved for the backward pass.

    Example:
      >>> import jax, jax.numpy as jnp, jaxlinear
      >>> def block(x, weight):
      ...     return jnp.tanh(jaxlinear.linear(x, weight))
      >>> block = jax.checkpoint(block, policy=jaxlinear.save_linear_outputs)
      >>> jax.grad(lambda x: block(x, jnp.ones((2, 3))).sum())(jnp.zeros(3))
      Array([2., 2., 2.], dtype=float32)
    """
    is_map = primitive is linear_map_p
    is_layer = is_map and parameters["kind"].derivative is _derivative
    return is_layer or _named(primitive, *types, **parameters)
