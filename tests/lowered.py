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
    """Those of ``function`` in the order of the text."""
    lines = _lowered(function, arguments, platform).splitlines()
    return [_product(line) for line in lines if _is_product(line)]


def products_by_shape(function, *arguments, platform="cpu"):
    """The same by their shapes, of which no two are the same."""
    found = lowered_products(function, *arguments, platform=platform)
    by_shape = {product.shape: product for product in found}
    assert len(by_shape) == len(found)
    return by_shape


def products_run(function, *arguments, platform):
    """How many products run: those of a function that is called twice count twice."""
    body = r"func\.func \w+ @(\S+?)\((.*?)\n  }\n"
    text = _lowered(function, arguments, platform)
    functions = dict(re.findall(body, text, re.DOTALL))

    def count(name):
        called = re.findall(r"call @(\S+?)\(", functions[name])
        own = sum(map(_is_product, functions[name].splitlines()))
        return own + sum(map(count, called))

    return count("main")


def _lowered(function, arguments, platform):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def _is_product(line):
    return "stablehlo.dot_general" in line


def _product(line):
    *operands, result = (_shape_and_dtype(t) for t in _PRODUCT.search(line).groups())
    (_, a), (_, b) = operands
    shape, dtype = result
    return LoweredProduct(shape, (a, b), dtype, line)


def _shape_and_dtype(tensor):
    *shape, dtype = tensor.split("x")
    return tuple(n for n in map(int, shape) if n != 1), dtype
