"""How far the products of this machine are from those in float64."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlinear._linear import linear
from jaxlinear._product import FLOAT8, INT8, Product, Products, accumulator_dtype
from jaxlinear._product_checks import checked_products
from jaxlinear.inspect._rounding import rounding

ROWS = FEATURES = 512
QUANTITIES = "Y", "∇X", "∇W", "∇B"
_BFLOAT16 = Product("bfloat16")
_BACKWARD_BFLOAT16 = Products(input_grad=_BFLOAT16, weight_grad=_BFLOAT16)
_SENT_IN_BFLOAT16 = Products(weight_grad=Product(preferred_element_type="bfloat16"))
# name: dtype of the arguments, dtype of the computation
DTYPES = {
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32": ("float32", "float32"),
    "mixed": ("float32", "bfloat16"),
}
RECIPES = {
    "float16, gradients bfloat16": ("float16", "float16", _BACKWARD_BFLOAT16),
    "mixed, ∇W sent in bfloat16": ("float32", "bfloat16", _SENT_IN_BFLOAT16),
    "float8": ("float32", "float32", FLOAT8),
    "int8": ("float32", "float32", INT8),
}
"""The same two dtypes, and products, which no layer but ours has."""
PRECISIONS = None, "highest"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The relative error of one quantity, in the Frobenius norm, against float64.

    ``explained`` is the error that rounding to the dtype of the result and accumulating
    in float32 at least explain, and the roundings that products ask for, or that the
    device does at this precision.
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


def layers():
    found = {"jaxlinear": _ours, "naive": _naive}
    return found | ({"Flax": _flax} if importlib.util.find_spec("flax") else {})


def measured(device):
    """Yield the measurements of ``device``, those of one dtype together."""
    for name, dtypes in DTYPES.items():
        yield from _measured(device, name, *dtypes, layers())
    for name, (argument_dtype, dtype, products) in RECIPES.items():
        ours = {"jaxlinear": functools.partial(_ours, products=products)}
        yield from _measured(device, name, argument_dtype, dtype, ours, products)


def _measured(device, name, argument_dtype, dtype, layers, products=None):
    arrays = arguments(argument_dtype, dtype)
    for precision in PRECISIONS:
        of_device = rounding(device, dtype, precision)
        expected = _expected(arrays, dtype, of_device)
        of_products = _of_products(arrays, expected, products, of_device)
        for layer, function in layers.items():
            with jax.default_matmul_precision(precision):
                results = _forward_and_backward(function, dtype)(*arrays)
            for quantity, actual, its_expected, of_product in zip(
                QUANTITIES, results, expected, of_products, strict=True
            ):
                exact, *_ = its_expected
                yield Measurement(
                    name,
                    quantity,
                    layer,
                    precision or "default",
                    norm(np.asarray(actual, np.float64) - exact) / norm(exact),
                    _explained(actual.dtype, *its_expected) + of_product / norm(exact),
                )


def arguments(argument_dtype, dtype, out_features=FEATURES):
    """X, W and B as a layer of a trained model has them, and G."""
    generator, bound = np.random.default_rng(0), FEATURES**-0.5
    X = generator.standard_normal((ROWS, FEATURES))
    G = generator.standard_normal((ROWS, out_features))
    W = generator.uniform(-bound, bound, (out_features, FEATURES))
    B = generator.uniform(-bound, bound, out_features)
    arrays = [jnp.asarray(a.astype(np.float32), argument_dtype) for a in (X, W, B)]
    return *arrays, jnp.asarray(G.astype(np.float32), dtype)


def _forward_and_backward(function, dtype):
    @jax.jit
    def results(x, weight, bias, G):
        Y, vjp = jax.vjp(lambda *a: function(*a, dtype=dtype), x, weight, bias)
        return Y, *vjp(G)

    return results


def _expected(arrays, dtype, of_device):
    """Y, ∇X, ∇W and ∇B in float64, each with what its error follows from.

    That is the sum of the magnitudes of its terms, their number, and what is rounded to
    the dtype of the result before it. The operands of the products are rounded to
    ``dtype``, as each layer does; the bias is as it came.
    """
    X, W, B, G = arrays
    X, W = X.astype(dtype), W.astype(dtype)
    X, W, B, G = (np.asarray(a, np.float64) for a in (X, W, B, G))

    def formulas(X, W, B, G):
        return X @ W.T + B, G @ W, G.T @ X, G.sum(axis=0)

    terms = FEATURES + 1, FEATURES, ROWS, ROWS
    magnitudes = formulas(*map(np.abs, (X, W, B, G)))
    of_Y = X @ W.T, np.broadcast_to(B, (ROWS, FEATURES))
    before = of_Y if of_device.is_y_rounded_before_bias else (), (), (), ()
    return list(zip(formulas(X, W, B, G), magnitudes, terms, before, strict=True))


def _explained(dtype, exact, magnitude, terms, before=()):
    """The relative error of one rounding to ``dtype`` and of a sum of ``terms`` terms.

    With unit roundoff u, rounding y moves it by at most u |y|, and evenly so by u |y| /
    √3 in the mean square. The same holds of each array that is rounded ``before``, and
    these errors are independent. A sum in any order has the error √n u Σ|term| if its
    roundings are independent (Higham and Mary, A New Approach to Probabilistic Rounding
    Error Analysis, 2019).
    """
    rounded = math.hypot(*map(norm, (exact, *before)))
    of_roundings = unit_roundoff(dtype) / math.sqrt(3) * rounded
    u = unit_roundoff(accumulator_dtype(dtype))
    return (of_roundings + math.sqrt(terms) * u * norm(magnitude)) / norm(exact)


def _of_products(arrays, expected, products, of_device):
    """The error of Y, ∇X, ∇W and ∇B that products ask for, in the Frobenius norm.

    It is that of rounding the operands, and of rounding the result where it leaves the
    accumulator. The errors of different elements are independent, so the variance of a
    sum of products is the sum of theirs. A tenth more is for chance. Operands of which
    nothing is asked may be rounded by the device.
    """
    X, W, _, G = (np.asarray(a, np.float64) for a in arrays)
    pairs = (X, W.T), (G, W), (G.T, X)

    def of(product, a, b, exact):
        variance = moved = 0.0
        if product.dtype is None:
            variances, movement = of_operands(a, b, of_device)
            variance, moved = np.sum(variances), norm(movement)
        else:
            is_per_row, dtypes = product.scaling == "per_row", product.dtype
            dtypes = dtypes if product.is_scaled else (dtypes, dtypes)
            first, second = (
                _variance(operand, dtype, axis if is_per_row else None)
                for operand, dtype, axis in zip((a, b), dtypes, (1, 0), strict=True)
            )
            variance += np.sum(first @ b**2 + (a**2 + first) @ second)
        if product.preferred_element_type is not None:
            variance += np.sum(_variance(exact, product.preferred_element_type))
        return 1.1 * math.sqrt(variance) + moved

    products = checked_products(products, None)
    results = (exact for exact, *_ in expected)
    return [
        *(
            of(p, *pair, y)
            for p, pair, y in zip(products, pairs, results, strict=False)
        ),
        0.0,
    ]


def of_operands(a, b, of_device):
    """The variance of each element of A B where a device rounds the operands.

    And how far it is moved: bits that are cut off take each operand toward zero, by its
    u at most on average. Their variance is that of rounding.
    """
    u = of_device.roundoff
    variance = 2 * u**2 / 3 * (a**2 @ b**2)
    return variance, (2 * u if of_device.may_truncate else 0) * np.abs(a @ b)


def _variance(operand, dtype, contracted_axis=None):
    """That of rounding each element evenly, to a step of int8 or of its float."""
    largest = np.max(np.abs(operand), contracted_axis, keepdims=True)
    if dtype == "int8":
        return np.broadcast_to((largest / 127) ** 2 / 12, operand.shape)
    return (unit_roundoff(dtype) * operand) ** 2 / 3


def unit_roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def norm(array):
    return float(np.linalg.norm(array))
