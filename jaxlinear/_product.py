"""The noun: a product of a linear layer, and what a user may choose of it.

The same objects, with nothing left open in them, are what the op carries
(:func:`jaxlinear._arguments.completed`) and what chooses a form on CPU.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


class Product(NamedTuple):
    """How one product of a linear layer is computed. None is the layer's default.

    Attributes:
      dtype: floating or complex dtype to which the operands are cast: one, or a pair in
        the order of the formula, (X, W), (G, W) or (G, X), of which both must be equal.
        Or, for a gradient, ``"alternative_float16"``: see
        :data:`jaxlinear.ALTERNATIVE_FLOAT16`.
      precision: as in :func:`jax.lax.dot_general`: a ``jax.lax.Precision``, a
        ``jax.lax.DotAlgorithmPreset``, the name of either, or one for each operand. The
        derivatives of a product have its precision.
      preferred_element_type: dtype in which the product leaves its accumulator, so the
        one in which partial sums are added across devices: that of the operands, or
        their accumulator's (float32 for float16 and bfloat16). Default: that of the
        result, or the accumulator's where another rounding would follow.
    """

    dtype: DTypeLike | tuple[DTypeLike, DTypeLike] | None = None
    precision: lax.PrecisionLike = None
    preferred_element_type: DTypeLike | None = None

    @property
    def is_alternative_float16(self) -> bool:
        return isinstance(self.dtype, str) and self.dtype == "alternative_float16"

    @property
    def operand_dtype(self) -> np.dtype:
        """The dtype of both operands, where it is not left to the layer."""
        return jnp.dtype("float16" if self.is_alternative_float16 else self.dtype)


class Products(NamedTuple):
    """The three products of a linear layer: Y = X Wᵀ, ∇X = G W and ∇W = Gᵀ X.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlinear import Product, Products, linear
      >>> products = Products(weight_grad=Product(precision="highest"))
      >>> linear(jnp.ones(3), jnp.ones((2, 3)), products=products)
      Array([3., 3.], dtype=float32)
    """

    forward: Product = Product()
    input_grad: Product = Product()
    weight_grad: Product = Product()


ALTERNATIVE_FLOAT16 = Products(
    input_grad=Product("alternative_float16"),
    weight_grad=Product("alternative_float16"),
)
"""Gradients in float16 with a hint to AMD GPUs (ROCm), some of which then multiply in
bfloat16 inside, as they do for PyTorch. Not run on such hardware."""


def is_algorithm(precision):
    return isinstance(precision, lax.DotAlgorithmPreset | lax.DotAlgorithm)


def accumulator(dtype):
    """The dtype in which sums of ``dtype`` are accumulated: float32 at least."""
    is_low = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return jnp.dtype("float32") if is_low else jnp.dtype(dtype)
