"""The products that a program asks a platform for, read from its lowered text."""

import re
from typing import NamedTuple

import jax

_PRODUCT = re.compile(
    r"stablehlo\.dot_general.* : \(tensor<(\S+?)>, tensor<(\S+?)>\) -> tensor<(\S+?)>"
)


class LoweredProduct(NamedTuple):
    shape: tuple[int, ...]  # of the result, without axes of length one
    operands: tuple[str, str]  # dtypes
    result: str  # dtype
    text: str


def lowered_products(function, *arguments, platform="cpu"):
    """Those of ``function`` in the order of the text, each once for each function."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return [_product(line) for line in lowered.as_text().splitlines() if _is_one(line)]


def products_by_shape(function, *arguments, platform="cpu"):
    """The same, where no two results have the same shape."""
    found = lowered_products(function, *arguments, platform=platform)
    by_shape = {product.shape: product for product in found}
    assert len(by_shape) == len(found)
    return by_shape


def _is_one(line):
    return "stablehlo.dot_general" in line


def _product(line):
    *operands, result = (_shape_and_dtype(t) for t in _PRODUCT.search(line).groups())
    (_, a), (_, b) = operands
    shape, dtype = result
    return LoweredProduct(shape, (a, b), dtype, line)


def _shape_and_dtype(tensor):
    *shape, dtype = tensor.split("x")
    return tuple(n for n in map(int, shape) if n != 1), dtype
