"""Whether a peer's answer is right: its error, and what rounding explains.

The operands are drawn, independent and with mean zero, and the error is relative in the
Frobenius norm. With unit roundoff u and sums of n terms:

- Ours rounds a result once, u, and accumulates in float32 at least. Independent
  roundings of a sum in any order move it by at most λ √n u Σ|term| with probability
  1 - 2n exp(-λ²/2), and by a small part of it in practice, so that λ = 1 (Higham and
  Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
- Others may round after the product, the bias and a cast, 3 u, and may accumulate in
  the compute dtype, one term after the other. There Σ|term| is too coarse for data with
  mean zero (Higham and Mary, Sharper Probabilistic Backward Error Analysis for Basic
  Linear Algebra Kernels with Random Data, 2020): a partial sum of k terms is about
  σ √k, its rounding at most u σ √k, and u σ √(k/3) in the mean square. Summed over k,
  and relative to σ √n, that is u √(n/6). λ = 2 leaves room for roundings that are not
  independent.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results_file import OURS
from benchmarks.workloads import RECIPE_ERRORS
from jaxlinear.inspect._rounding import rounding

OTHERS_LAMBDA = 2


def roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def operand_roundoff(compute_dtype, device):
    """Of a term: each is a product of two operands that the device may have rounded."""
    return 2 * rounding(device, compute_dtype).roundoff


def bound(library, result_dtype, compute_dtype, expected, device):
    """The largest relative error that rounding explains."""
    exact, magnitude, terms = expected
    if library == OURS:
        accumulator = min(roundoff("float32"), roundoff(compute_dtype))
        spread = np.linalg.norm(magnitude) / np.linalg.norm(exact)
        explained = roundoff(result_dtype)
        explained += math.sqrt(terms) * accumulator * spread
    else:
        explained = 3 + OTHERS_LAMBDA * math.sqrt(terms / 6)
        explained *= roundoff(compute_dtype)
    return explained + operand_roundoff(compute_dtype, device)


def checked_errors(case, library, results, expected, compute_dtype, device, flip):
    """{quantity: relative error}; ArithmeticError if one is more than its bound.

    ``case`` names the workload, dtype and mode; with ``flip`` the weight is (in, out).
    """
    _, dtype_name, _ = case
    of_8_bits = RECIPE_ERRORS.get(dtype_name, 0) if library == OURS else 0
    errors = {}
    for name, result in results.items():
        dtype = result.dtype if isinstance(result, jax.Array) else compute_dtype
        actual = as_float64(result)
        actual = actual.T if flip and name == "grad_W" else actual
        errors[name] = relative_error(actual, expected[name][0])
        limit = bound(library, dtype, compute_dtype, expected[name], device)
        limit += of_8_bits if name != "grad_B" else 0
        require(case, library, name, errors[name], limit)
    return errors


def require(case, library, quantity, error, limit):
    if not error <= limit:  # NaN is wrong as well.
        raise ArithmeticError(
            f"{', '.join(case)}: {quantity} of {library} is wrong,"
            f" relative error {error:.2g}, bound {limit:.2g}"
        )


def as_float64(result):
    return np.asarray(result, np.float64)


def relative_error(actual, exact):
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
