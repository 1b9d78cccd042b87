"""What a product may be, and what its defaults are.

An error names the product and the field. What JAX refuses clearly by itself, such as an
algorithm that a device does not have, is left to JAX.
"""

import difflib
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlinear._checks import DTYPES, RECIPE_OF, checked_dtype, meant_dtype
from jaxlinear._product import (
    EIGHT_BIT_PAIRS,
    Product,
    Products,
    Scaling,
    accumulator_dtype,
    is_algorithm,
)


def checked_products(products, precision, dtype=None):
    """``products`` with dtypes and precisions for their names.

    ``precision`` is the default of each product. The layer's ``dtype`` is None where it
    is not known yet; a product without a dtype is then checked later.
    """
    products = Products() if products is None else products
    if not isinstance(products, Products):
        got = _got_for_products(products)
        raise TypeError(f"`products` must be a jaxlinear.Products, got {got}")
    precision = checked_precision("precision", precision)

    def checked(field, product):
        return _checked_product(f"products.{field}", product, precision, dtype)

    return Products(*map(checked, Products._fields, products))


def _checked_product(name, product, precision, dtype):
    if not isinstance(product, Product):
        got = _got_for_product(name.removeprefix("products."), product)
        raise TypeError(f"`{name}` must be a jaxlinear.Product, got {got}")
    if product.precision is not None:
        precision = checked_precision(f"{name}.precision", product.precision)
    operands = _checked_operands(name, product)
    preferred = product.preferred_element_type
    if preferred is not None:
        also = "int32" if operands == (jnp.dtype("int8"),) * 2 else ""
        preferred = _checked_element(f"{name}.preferred_element_type", preferred, also)
    scaling = _checked_scaling(name, product.scaling, isinstance(operands, tuple))
    product = Product(operands, precision, preferred, scaling)
    if dtype is not None or operands is not None:
        _check_kinds(name, product, dtype)
    return product


_RECIPES = "FLOAT8", "FLOAT8_E4M3", "INT8", "ALTERNATIVE_FLOAT16"


def _got_for_products(value):
    """What came instead of a `Products`, and what may be meant by it."""
    kind = type(value).__name__
    if isinstance(value, Product):
        return f"{kind}: say for which, as in `Products(weight_grad=...)`"
    if isinstance(value, Mapping):
        return f"{kind}. Did you mean `Products(**...)`?"
    if isinstance(value, tuple | list):
        return f"{kind}. Did you mean `Products(*...)`?"
    name = value if isinstance(value, str) else _name_of_dtype(value)
    meant = meant_dtype(name)
    if name.upper() in _RECIPES:
        return f"{name!r}. Did you mean `jaxlinear.{name.upper()}`?"
    if name in _PRECISIONS and name not in DTYPES:
        return f"{name!r}. Did you mean `precision={name!r}`?"
    if meant in RECIPE_OF:
        return f"{name!r}. Did you mean `jaxlinear.{RECIPE_OF[meant]}`?"
    if meant:
        return f"{name!r}. Did you mean `dtype={meant!r}`?"
    return repr(value) if isinstance(value, str) else kind


def _name_of_dtype(value):
    name = getattr(value, "__name__", str(value))
    return name if name in (*DTYPES, *RECIPE_OF) else ""


def _got_for_product(field, value):
    """What came instead of a `Product`, and what may be meant by it."""
    if isinstance(value, Products):
        return f"Products. Did you mean its `{field}`?"
    name = value if isinstance(value, str) else _name_of_dtype(value)
    if meant := meant_dtype(name):
        return f"{name!r}. Did you mean `Product({meant!r})`?"
    return type(value).__name__


def _checked_operands(name, product):
    """One dtype for both operands, two of 8 bits, "alternative_float16", or None."""
    if product.dtype is None:
        return None
    if product.is_alternative_float16:
        if name == "products.forward":
            raise ValueError(
                "`products.forward.dtype` must be a dtype, got alternative_float16,"
                " which ROCm has only for gradients"
            )
        return product.dtype
    name = f"{name}.dtype"
    pair = product.dtype
    if not isinstance(pair, tuple | list):
        pair = pair, pair
    if len(pair) != 2:
        raise ValueError(f"`{name}` must be one dtype or two, got {product.dtype!r}")
    first, second = (_checked_element(name, dtype, also="int8") for dtype in pair)
    if (first, second) in EIGHT_BIT_PAIRS:
        return first, second
    if min(first.itemsize, second.itemsize) == 1:
        known = "({}, {})".format(*EIGHT_BIT_PAIRS[0])
        raise ValueError(
            f"`{name}` of 8 bits must be a pair that some platform multiplies, such as"
            f" {known}, got {first} and {second}"
        )
    if first != second:
        raise ValueError(f"`{name}` must be two equal dtypes, got {first} and {second}")
    return first


def _checked_element(name, dtype, also):
    """``dtype`` as a floating or complex dtype, or as the one named ``also``."""
    is_dtype = isinstance(dtype, (str, np.dtype, type))
    if is_dtype and also in (dtype, getattr(dtype, "__name__", None)):
        return jnp.dtype(also)
    return checked_dtype(name, dtype, bits=0, also=f" or {also}" if also else "")


def _checked_scaling(name, scaling, has_8_bits):
    """The scaling of a product of 8 bits, None for any other product."""
    if not has_8_bits:
        if scaling is not None:
            raise ValueError(
                f"`{name}.scaling` must be None without 8 bits, got {scaling!r}"
            )
        return None
    if scaling is None:
        return "per_tensor"
    if scaling not in get_args(Scaling):
        known = " or ".join(map(repr, get_args(Scaling)))
        raise ValueError(f"`{name}.scaling` must be {known}, got {scaling!r}")
    return scaling


def _check_kinds(name, product, dtype):
    """Refuse dtypes that do not go together; ``dtype`` is the layer's, or None."""
    if product.is_scaled:
        allowed = (accumulator_dtype(product.dtype[0]),)
        if dtype is not None and _kind(dtype) != "floating":
            raise TypeError(
                f"`{name}.dtype` of 8 bits must be in a layer of a floating dtype, got"
                f" {dtype}"
            )
    else:
        operand = dtype if product.dtype is None else product.operand_dtype
        allowed = accumulator_dtype(operand), operand
        if dtype is not None and _kind(operand) != _kind(dtype):
            raise TypeError(
                f"`{name}.dtype` must be {_kind(dtype)} as {dtype} is, got {operand}"
            )
    preferred = product.preferred_element_type
    if preferred is not None and preferred not in allowed:
        allowed = " or ".join(dict.fromkeys(map(str, allowed)))
        raise TypeError(
            f"`{name}.preferred_element_type` must be {allowed}, got {preferred}"
        )


def _kind(dtype):
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else "integer"


def with_defaults(products, dtype, x, weight, bias):
    """``products`` of a layer that computes in ``dtype``, with the defaults filled in.

    One element type stays None. If a bias is added to a forward product whose dtype has
    fewer bits than its accumulator, GPUs round before the addition and other platforms
    after it.
    """
    results = dtype, x.dtype, weight.dtype
    # Now: the backward pass may be traced under another default.
    precision = _default_precision()

    def filled(name, product, result):
        _check_kinds(f"products.{name}", product, dtype)
        if product.dtype is None:
            product = product._replace(dtype=dtype)
        if product.precision is None:
            product = product._replace(precision=precision)
        if product.preferred_element_type is not None:
            if not product.is_scaled:
                return product
            # An int32 sum is scaled in float32.
            return product._replace(preferred_element_type=jnp.dtype("float32"))
        # A product of 8 bits has the element type that it would have in `dtype`.
        operand = dtype if product.is_scaled else product.operand_dtype
        wide = accumulator_dtype(operand)
        if operand != result:  # The product must not round to another dtype first.
            preferred = wide
        elif name == "forward" and bias is not None and operand != wide:
            preferred = None
        else:
            preferred = operand
        return product._replace(preferred_element_type=preferred)

    return Products(*map(filled, Products._fields, products or Products(), results))


def _default_precision():
    default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return checked_precision("jax_default_matmul_precision", default)


def checked_precision(name: str, precision: Any) -> Any:
    """``precision`` in the hashable form that ``lax.dot_general`` takes, not a name."""
    if isinstance(precision, tuple | list) and len(precision) == 2:
        return tuple(checked_precision(name, operand) for operand in precision)
    if isinstance(precision, str):
        precision = _PRECISIONS.get(precision, precision)
    if precision is lax.DotAlgorithmPreset.DEFAULT:
        precision = lax.Precision.DEFAULT
    is_known = precision is None or isinstance(precision, lax.Precision)
    if is_known or is_algorithm(precision):
        return precision
    raise ValueError(
        f"`{name}` must be a jax.lax.Precision, a jax.lax.DotAlgorithmPreset, the name"
        " of either, or one of these for each operand, got"
        f" {precision!r:.60}{_similar_precision(precision)}"
    )


_PRECISIONS = {
    name: lax.Precision(name)
    for name in (
        *("default", "fastest", "bfloat16"),
        *("high", "bfloat16_3x", "tensorfloat32"),
        *("highest", "float32"),
    )
}
_PRECISIONS |= lax.DotAlgorithmPreset.__members__

_SHORT = {"tf32": "tensorfloat32", "bf16": "bfloat16", "fp32": "float32"}


def _similar_precision(name):
    names = {known.lower(): known for known in reversed(_PRECISIONS)}
    name = str(name).lower()
    similar = difflib.get_close_matches(_SHORT.get(name, name), names)
    return f". Did you mean {names[similar[0]]!r}?" if similar else ""
