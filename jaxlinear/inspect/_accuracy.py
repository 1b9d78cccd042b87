"""How far the products of this machine are from those in float64."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._arguments import checked_products
from jaxlinear._linear import linear
from jaxlinear._product import FLOAT8, INT8, accumulator

ROWS = FEATURES = 512
QUANTITIES = "Y", "∇X", "∇W", "∇B"
# name: dtype of the arguments, dtype of the computation
DTYPES = {
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
}
EIGHT_BITS = {"float8": FLOAT8, "int8": INT8}
"""The recipes, of float32 arguments, which no layer but ours has."""
PRECISIONS = None, "highest"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The relative error of one quantity, in the Frobenius norm, against float64.

    ``explained`` is the error that rounding to the dtype of the result and accumulating
    in float32 at least explain; in 8 bits that of rounding the operands, too.
    """

    dtype: str
    quantity: str
    layer: str
    precision: str
    error: float
    explained: float

    @property
    def is_explained(self):
        return self.error <= self.explained  # False for NaN.


def _ours(x, weight, bias, dtype, products=None):
    return linear(x, weight, bias, dtype=dtype, products=products)


def _naive(x, weight, bias, dtype):
    return x.astype(dtype) @ weight.astype(dtype).T + bias.astype(dtype)[None]


def _flax(x, weight, bias, dtype):
    from flax import nnx

    layer = nnx.Linear(
        *weight.shape[::-1],
        dtype=dtype,
        kernel_init=lambda *_: weight.T,
        bias_init=lambda *_: bias,
        rngs=nnx.Rngs(0),
    )
    return layer(x)


def _layers():
    layers = {"jaxlinear": _ours, "naive": _naive}
    return layers | ({"Flax": _flax} if importlib.util.find_spec("flax") else {})


def measured():
    """Yield the measurements, those of one dtype together."""
    for name, dtypes in DTYPES.items():
        yield from _measured(name, *dtypes, _layers())
    for name, products in EIGHT_BITS.items():
        ours = functools.partial(_ours, products=products)
        yield from _measured(name, "float32", "float32", {"jaxlinear": ours}, products)


def _measured(name, argument_dtype, dtype, layers, products=None):
    arrays = _arguments(argument_dtype, dtype)
    expected = _expected(arrays, dtype)
    of_operands = _of_operands(arrays, products)
    for precision in PRECISIONS:
        for layer, function in layers.items():
            with jax.default_matmul_precision(precision):
                results = _forward_and_backward(function, dtype)(*arrays)
            for quantity, actual, (exact, magnitude, terms), rounding in zip(
                QUANTITIES, results, expected, of_operands, strict=True
            ):
                yield Measurement(
                    name,
                    quantity,
                    layer,
                    precision or "default",
                    _norm(np.asarray(actual, np.float64) - exact) / _norm(exact),
                    _explained(actual.dtype, exact, magnitude, terms)
                    + rounding / _norm(exact),
                )


def _arguments(argument_dtype, dtype):
    """X, W and B as a layer of a trained model has them, and G."""
    generator, bound = np.random.default_rng(0), FEATURES**-0.5
    X, G = generator.standard_normal((2, ROWS, FEATURES))
    W = generator.uniform(-bound, bound, (FEATURES, FEATURES))
    B = generator.uniform(-bound, bound, FEATURES)
    arguments = [jnp.asarray(a.astype(np.float32), argument_dtype) for a in (X, W, B)]
    return *arguments, jnp.asarray(G.astype(np.float32), dtype)


def _forward_and_backward(function, dtype):
    @jax.jit
    def results(x, weight, bias, G):
        Y, vjp = jax.vjp(lambda *a: function(*a, dtype=dtype), x, weight, bias)
        return Y, *vjp(G)

    return results


def _expected(arrays, dtype):
    """Y, ∇X, ∇W and ∇B in float64, with the sum of the magnitudes of their terms.

    The operands of the products are rounded to ``dtype``, as each layer does; the bias
    is as it came.
    """
    X, W, B, G = arrays
    X, W = X.astype(dtype), W.astype(dtype)
    X, W, B, G = (np.asarray(a, np.float64) for a in (X, W, B, G))

    def formulas(X, W, B, G):
        return X @ W.T + B, G @ W, G.T @ X, G.sum(axis=0)

    terms = FEATURES + 1, FEATURES, ROWS, ROWS
    magnitudes = formulas(*map(np.abs, (X, W, B, G)))
    return list(zip(formulas(X, W, B, G), magnitudes, terms, strict=True))


def _explained(dtype, exact, magnitude, terms):
    """The relative error of one rounding to ``dtype`` and of a sum of ``terms`` terms.

    With unit roundoff u, rounding y moves it by at most u |y|, and evenly so by u |y| /
    √3 in the mean square. A sum in any order has the error √n u Σ|term| if its
    roundings are independent (Higham and Mary, A New Approach to Probabilistic Rounding
    Error Analysis, 2019).
    """
    rounding = _unit_roundoff(dtype) / math.sqrt(3)
    accumulating = math.sqrt(terms) * _unit_roundoff(accumulator(dtype))
    return rounding + accumulating * _norm(magnitude) / _norm(exact)


def _of_operands(arrays, products):
    """The error of Y, ∇X, ∇W and ∇B from 8-bit operands, in the Frobenius norm.

    The errors of different elements are independent, so the variance of a sum of
    products is the sum of theirs. A tenth more is for chance.
    """
    if products is None:
        return [0.0] * 4
    X, W, _, G = (np.asarray(a, np.float64) for a in arrays)
    pairs = (X, W.T), (G, W), (G.T, X)

    def of(product, a, b):
        is_per_row = product.scaling == "per_row"
        first, second = (
            _variance(operand, dtype, axis if is_per_row else None)
            for operand, dtype, axis in zip((a, b), product.dtype, (1, 0), strict=True)
        )
        return 1.1 * math.sqrt(np.sum(first @ b**2 + (a**2 + first) @ second))

    products = checked_products(products, None)
    return [of(p, *pair) for p, pair in zip(products, pairs, strict=True)] + [0.0]


def _variance(operand, dtype, contracted_axis):
    """That of rounding each element evenly, to a step of int8 or of its float8."""
    largest = np.max(np.abs(operand), contracted_axis, keepdims=True)
    if dtype == "int8":
        return np.broadcast_to((largest / 127) ** 2 / 12, operand.shape)
    return (_unit_roundoff(dtype) * operand) ** 2 / 3


def _unit_roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def _norm(array):
    return float(np.linalg.norm(array))
