"""The linear layer and its derivative: Y = X Wᵀ + B.

Read from top to bottom: the public function checks its arguments and settles the dtype,
the op computes, the rule differentiates.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlinear._checks import (
    ArrayLike,
    check_shapes,
    checked_arrays,
    checked_dtype,
    compute_dtype,
)
from jaxlinear._every_mode import Term, in_every_mode
from jaxlinear._op.formulas import (
    bias_gradient,
    forward_product,
    input_gradient,
    weight_gradient,
)
from jaxlinear._op.operands import kept_operand, operand, shared_operand
from jaxlinear._op.sharding import (
    ArrayType,
    broadcast_over_rows,
    cotangent_type,
    is_traced_with_explicit_axes,
)
from jaxlinear._plain import is_plain, plain_linear
from jaxlinear._product import Precision, Products, accumulator_dtype
from jaxlinear._product_checks import checked_products, with_defaults


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

    where ``*`` is any number of leading axes, including none. Given the cotangent
    G = ∂Loss/∂Y, reverse mode computes::

        ∇X = G W     ∇W = Gᵀ X     ∇B = Σ G

    with the leading axes contracted in ∇W and summed in ∇B. Each product is accumulated
    in at least float32 and rounded once: Y to ``dtype``, each gradient to the dtype of
    its own argument. So with float32 weights and ``dtype=bfloat16`` the weight gradient
    does not pass through bfloat16. On GPUs Y is also rounded before the bias is added,
    as in the naive formula; XLA would otherwise write the float32 product to memory. A
    forward product with ``preferred_element_type=float32`` is not rounded before that.

    Given tangents dX, dW and dB, forward mode computes::

        dY = dX Wᵀ + X dWᵀ + dB

    as the forward product is computed, with float32 sums that are rounded once. An
    argument without a tangent costs no product, and tangents are never in 8 bits. Both
    modes read X and W as they are kept for the backward pass, with the bits of the
    operands of a gradient. The modes combine to any order, and ``jax.linear_transpose``
    takes the layer as a function of ``x`` or of ``weight``.

    The function is jitted, except on a mesh with explicit axes and under
    :func:`jaxlinear.plain_autodiff`. The result of a differentiated call has the
    checkpoint name ``"linear"``; the policy :func:`jaxlinear.save_linear_outputs` saves
    that of every call. A rounded or 8-bit copy that is kept for the backward pass has
    the name ``"linear_x"`` or ``"linear_weight"``, and a scale ``"linear_scale"``.

    Args:
      x: input, with at least one axis. Arguments are whatever ``jnp.asarray`` takes,
        except lists and other containers. Integers are promoted as in ``jax.numpy``. If
        all are integers and ``dtype`` is None, so is Y, and there is no gradient.
      weight: matrix (out, in), the layout of PyTorch.
      bias: vector (out,), or None. It is added before Y is rounded (on GPUs after).
      dtype: floating or complex dtype of the products' operands and of the result, of
        16 bits or more. Default: the promoted dtype of the arguments.
      precision: precision of the three products, as in :func:`jax.lax.dot_general`.
        TensorFloat32 is ``"tensorfloat32"``, or ``"TF32_TF32_F32"`` and
        ``"TF32_TF32_F32_X3"``, which raise on a device without it. Default:
        ``jax_default_matmul_precision``.
      products: overrides ``dtype`` and ``precision`` for one product at a time.
        ``Products(weight_grad=Product(...))`` with

        - ``precision="highest"`` computes the weight gradient with all bits;
        - ``dtype=float32``, under ``dtype=bfloat16``, multiplies arguments that are not
          rounded; G itself comes in ``dtype``;
        - ``dtype=bfloat16``, under ``dtype=float16``, takes arguments beyond the range
          of float16; Y and G themselves stay in float16;
        - ``preferred_element_type=bfloat16``, under ``dtype=bfloat16``, halves the
          bytes that data parallelism sends, and rounds the gradient to bfloat16;
        - a ``dtype`` of 8 bits multiplies scaled operands, made from the arguments as
          they came. The recipes :data:`jaxlinear.FLOAT8`, :data:`jaxlinear.FLOAT8_E4M3`
          and :data:`jaxlinear.INT8` do so in all three products. The operands kept for
          the gradients then have 8 bits, and there is no second derivative.

        Each gradient is returned in the dtype of its argument. The bias gradient
        is not affected; the bias is added in the dtype of the forward product.
      out_sharding: sharding of the result on a mesh with explicit axes, as in
        :func:`jax.lax.dot_general`.

    Returns:
      Y, of shape (*, out) and dtype ``dtype``.

    Raises:
      ValueError: if the shapes are not those above, a precision is unknown, or no
        platform multiplies the 8-bit operands that a product asks for.
      TypeError: if an argument is not an array; if a dtype is neither floating nor
        complex, has fewer than 16 bits, or is real while an argument is complex; if a
        product cannot have the ``preferred_element_type`` asked for; or for a second
        derivative of a layer that keeps operands in 8 bits.

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
    # Each option that is passed on costs time in every call.
    options = {}
    if dtype is not None:
        options["dtype"] = dtype = checked_dtype("dtype", dtype)
    if products is not None or precision is not None:
        options["products"] = checked_products(products, precision, dtype)
    if out_sharding is not None:
        options["out_sharding"] = out_sharding
    # The naive formula is not jitted: libraries that replace `lax.dot_general` must see
    # every call. Nor is a program with explicit axes: XLA would gather a sharded weight
    # for the forward pass and again for the backward (tests/test_collectives.py).
    bare = is_plain() or is_traced_with_explicit_axes(weight)
    apply = _apply if bare else _apply_jitted
    return apply(x, weight, bias, **options)


def _apply(x, weight, bias, *, dtype=None, products=None, out_sharding=None):
    check_shapes(x, weight, bias)
    dtype = compute_dtype(dtype, x, weight, bias)
    products = with_defaults(products, dtype, x, weight, bias)
    if is_plain() or not jnp.issubdtype(dtype, jnp.inexact):
        precision = products.forward.precision
        return plain_linear(x, weight, bias, dtype, precision, out_sharding)
    spec = Spec(
        products,
        Y=ArrayType(dtype, out_sharding),
        X=cotangent_type(x),
        W=cotangent_type(weight),
        B=None if bias is None else cotangent_type(bias),
    )
    op = _linear_of_these_axes if spec.has_given_axes else _linear_of_any_axes
    return op(x, weight, bias, spec)


_apply_jitted = jax.jit(_apply, static_argnames=("dtype", "products", "out_sharding"))


class Spec(NamedTuple):
    """The op's static argument. It has a hash, being a key of JAX's caches.

    Y is the type of the result. X, W and B are the types of the gradients.
    """

    products: Products
    Y: ArrayType
    X: ArrayType
    W: ArrayType
    B: ArrayType | None

    @property
    def has_given_axes(self):
        """Whether a mapped axis cannot become a leading axis.

        A sharding fixes the number of axes, and a scale per tensor is one tensor's.
        """
        is_sharded = any(t is not None and t.sharding for t in (self.X, self.W, self.B))
        return is_sharded or any(p.scaling == "per_tensor" for p in self.products)


# The op: Y = X Wᵀ + B. The casts are inside, so that the rule below decides the dtype
# of each gradient.


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, weight, bias, spec):
    return forward_product(x, weight, bias, spec.products.forward, spec.Y)


# The rule. With y_no = Σ_i x_ni w_oi + b_o for each row n of the leading axes, and
# G = ∂Loss/∂Y, the chain rule gives
#
#     ∂Loss/∂x_ni = Σ_o g_no w_oi      ∇X = G W
#     ∂Loss/∂w_oi = Σ_n g_no x_ni      ∇W = Gᵀ X
#     ∂Loss/∂b_o  = Σ_n g_no           ∇B = Σ G
#
# ∇X reads W, ∇W reads X and ∇B neither, so each operand is kept only if the other one
# is differentiated. It is kept as the rule multiplies it: in the dtype of that product,
# or in 8 bits with its scale.


class Residuals(NamedTuple):
    """What is kept: X for ∇W, W for ∇X, and ``rows`` (*, 0) for the axes of dY."""

    X: Any
    W: Any
    rows: jax.Array | None


def _linear_forward(x, weight, bias, spec):
    forward, input_grad, weight_grad = spec.products
    *leading, last = range(x.value.ndim)
    X = operand(x.value, forward, 0, (last,))
    W = operand(weight.value, forward, 1, (1,))
    B = None if bias is None else bias.value
    Y = checkpoint_name(forward_product(X, W, B, forward, spec.Y), "linear")
    return Y, Residuals(
        X=kept_operand("linear_x", x.value, X, weight_grad, leading)
        if weight.perturbed
        else None,
        W=kept_operand("linear_weight", weight.value, W, input_grad, (0,))
        if x.perturbed
        else None,
        rows=_rows(Y) if _lacks_rows(x, weight, bias) else None,
    )


def _linear_backward(spec, residuals, G):
    X, W, _ = residuals
    _, input_grad, weight_grad = spec.products
    if G.dtype != spec.Y.dtype:  # A sum over mapped elements, in float32.
        input_grad, weight_grad = (
            input_grad.widened(G.dtype),
            weight_grad.widened(G.dtype),
        )
    grad_B = None if spec.B is None else bias_gradient(G, spec.B)
    G = shared_operand(G, input_grad, weight_grad)
    grad_X = None if W is None else input_gradient(G, W, input_grad, spec.X)
    grad_W = None if X is None else weight_gradient(G, X, weight_grad, spec.W)
    return grad_X, grad_W, grad_B


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


def _lacks_rows(x, weight, bias):
    """Whether nothing else may give dY the leading or the mapped axes of Y.

    dB has no leading axes. And if `jax.vmap` maps only a bias without a tangent, Y is
    mapped, but dX Wᵀ is not: JAX would broadcast dY, and sum its cotangent in its own
    dtype.
    """
    if bias is None:
        return False
    return not bias.perturbed or not (x.perturbed or weight.perturbed)


def _rows(Y):
    return lax.stop_gradient(Y)[..., :0]


# Forward mode, and with it every mode: the differential, whose transpose is the rule.


def _linear_differential(spec, residuals, tangents):
    """The tangent dY = dX Wᵀ + X dWᵀ + dB, computed as Y is, and rounded once."""
    X, W, rows = residuals
    dX, dW, dB = tangents
    product = spec.products.forward
    if product.is_scaled:  # Tangents are not quantized.
        product = product._replace(dtype=spec.Y.dtype, scaling=None)
    if dX is not None and dW is not None:
        wide = accumulator_dtype(product.operand_dtype)
        product = product._replace(preferred_element_type=wide)
        Y_type = spec.Y._replace(dtype=wide)
        dY = forward_product(dX, W, dB, product, Y_type)
        dY += forward_product(X, dW, None, product, Y_type)
        return dY.astype(spec.Y.dtype)
    if dX is not None:
        return forward_product(dX, W, dB, product, spec.Y)
    if dW is not None:
        return forward_product(X, dW, dB, product, spec.Y)
    return broadcast_over_rows(dB.astype(spec.Y.dtype), rows)


_in_every_mode = partial(
    in_every_mode,
    _linear,
    _linear_differential,
    terms={
        "x": Term("W", contracted=-2),
        "weight": Term("X", contracted=0),
        "bias": Term(None, contracted=0),
    },
    linear_in=[("x", "bias"), ("weight", "bias")],
)
_linear_of_any_axes = _in_every_mode(leading=["x", "X", "rows"])
_linear_of_these_axes = _in_every_mode()
