"""A product of a linear layer, and what a user may choose of it.

The op carries the same objects with every default filled in, and they choose the form
of a product on a CPU.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

Scaling = Literal["per_tensor", "per_row"]


Precision = lax.PrecisionLike | Sequence[lax.PrecisionLike]
"""The precision of a product, or that of each operand."""


class Product(NamedTuple):
    """How one product of a linear layer is computed. None means the layer's default.

    Attributes:
      dtype: dtype to which the operands are cast: one, or a pair in the order of the
        formula, (X, W), (G, W) or (G, X). Floating or complex, and then both must be
        equal. Or of 8 bits, ``int8``, ``float8_e4m3fn``, ``float8_e5m2`` or what AMD
        has in their place, ``float8_e4m3fnuz`` and ``float8_e5m2fnuz``: the operands
        are then scaled, and the product accumulates in int32 or float32. A pair may be
        of two kinds of float8, but not e5m2 twice, which no platform multiplies. Or,
        for a gradient, ``"alternative_float16"``: see
        :data:`jaxlinear.ALTERNATIVE_FLOAT16`.
      precision: as in :func:`jax.lax.dot_general`: a ``jax.lax.Precision``, a
        ``jax.lax.DotAlgorithmPreset``, the name of either, or one for each operand. The
        derivatives of a product have its precision.
      preferred_element_type: dtype in which the product is returned, and in which
        devices sum their parts of it: that of the operands or of their accumulator
        (float32 for float16, bfloat16 and float8, int32 for int8); for 8 bits only that
        of the accumulator. Default: the dtype of the result, or the accumulator's if
        another rounding would follow.
      scaling: of 8-bit operands. ``"per_tensor"``: each has one scale. ``"per_row"``:
        each has one for every index of its axes that are not contracted, so for every
        token and every output channel in the forward product. A scale is float32, and
        the largest finite magnitude of the values at hand over the largest that the
        dtype has. Default: ``"per_tensor"``.
    """

    dtype: DTypeLike | tuple[DTypeLike, DTypeLike] | None = None
    precision: Precision = None
    preferred_element_type: DTypeLike | None = None
    scaling: Scaling | None = None

    @property
    def is_alternative_float16(self) -> bool:
        return isinstance(self.dtype, str) and self.dtype == "alternative_float16"

    @property
    def operand_dtype(self) -> np.dtype:
        """The dtype of both operands, if it is set and has more than 8 bits."""
        return jnp.dtype("float16" if self.is_alternative_float16 else self.dtype)

    def widened(self, dtype):
        """The product of a cotangent in ``dtype``, which has more bits than Y."""
        own = self.dtype if self.is_scaled else dtype
        return self._replace(dtype=own, preferred_element_type=dtype)

    @property
    def is_scaled(self) -> bool:
        """Whether the operands have 8 bits and a scale, in a checked product."""
        return self.scaling is not None


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

_E4M3 = Product("float8_e4m3fn", scaling="per_tensor")
_E5M2 = Product(("float8_e5m2", "float8_e4m3fn"), scaling="per_tensor")
_INT8 = Product("int8", scaling="per_row")

FLOAT8 = Products(_E4M3, _E5M2, _E5M2)
"""X and W in ``float8_e4m3fn`` and G, which has a wider range, in ``float8_e5m2``, each
with one scale: the recipe of Micikevicius et al., FP8 Formats for Deep Learning (2022),
with the scale of the tensor at hand."""

FLOAT8_E4M3 = Products(_E4M3, _E4M3, _E4M3)
"""All of X, W and G in ``float8_e4m3fn``, each with one scale: one bit more for G."""

INT8 = Products(_INT8, _INT8, _INT8)
"""All of X, W and G in ``int8``, with a scale for every row of each product."""

EIGHT_BIT_PAIRS = [
    (jnp.dtype(a), jnp.dtype(b))
    for a, b in [
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e4m3fn"),
        ("float8_e4m3fn", "float8_e5m2"),
        ("float8_e4m3fnuz", "float8_e4m3fnuz"),
        ("float8_e5m2fnuz", "float8_e4m3fnuz"),
        ("float8_e4m3fnuz", "float8_e5m2fnuz"),
        ("int8", "int8"),
    ]
]
"""The operands of 8 bits that some platform multiplies."""


def is_algorithm(precision):
    return isinstance(precision, lax.DotAlgorithmPreset | lax.DotAlgorithm)


def accumulator_dtype(dtype):
    """The dtype in which sums of ``dtype`` are accumulated: float32 at least."""
    if dtype == "int8":
        return jnp.dtype("int32")
    is_low = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return jnp.dtype("float32") if is_low else jnp.dtype(dtype)
