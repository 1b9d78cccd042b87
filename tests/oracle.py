"""What the tests compare with: the naive formula, and the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def naive(x, weight, bias=None, *, dtype=None, out_sharding=None):
    """X Wᵀ + B as people write it, for JAX's autodiff to differentiate."""
    arrays = [x, weight] if bias is None else [x, weight, bias]
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    arrays = [a.astype(dtype) for a in arrays]
    y = jnp.matmul(arrays[0], arrays[1].T, out_sharding=out_sharding)
    if bias is None:
        return y
    return y + jnp.expand_dims(arrays[2], range(y.ndim - 1))


def random_array(seed, shape, dtype):
    """Standard normal values, complex ones where ``dtype`` is, drawn by NumPy."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * generator.normal(size=shape)
    return jnp.asarray(values.astype(jnp.dtype(dtype)))


def random_problem(leading, in_features, out_features, dtype, seed=0):
    """x, weight, bias and a cotangent of the output."""
    x = random_array((seed, 0), (*leading, in_features), dtype)
    weight = random_array((seed, 1), (out_features, in_features), dtype)
    bias = random_array((seed, 2), (out_features,), dtype)
    cotangent = random_array((seed, 3), (*leading, out_features), dtype)
    return x, weight, bias, cotangent


def output_and_gradients(layer, x, weight, bias, cotangent):
    """Y, ∇X, ∇W and ∇B as ``layer`` computes them."""
    Y, vjp = jax.vjp(layer, x, weight, bias)
    return Y, *vjp(cotangent)


def wide(array):
    """``array`` in NumPy's float64 or complex128, exactly."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def exact(x, weight, bias, cotangent):
    """Y, ∇X, ∇W and ∇B in float64, each with the sum of the magnitudes of its terms."""
    X, W, B, G = map(wide, (x, weight, bias, cotangent))

    def formulas(X, W, B, G):
        rows = np.prod(X.shape[:-1], dtype=int)
        X_rows, G_rows = X.reshape(rows, X.shape[-1]), G.reshape(rows, G.shape[-1])
        return X @ W.T + B, G @ W, G_rows.T @ X_rows, G_rows.sum(axis=0)

    return zip(formulas(X, W, B, G), formulas(*map(np.abs, (X, W, B, G))), strict=True)


def assert_rounded_once(actual, expected, magnitude, terms):
    """``actual`` is ``expected`` but for accumulation and one rounding to its dtype.

    A sum of n terms accumulated with unit roundoff u is off by at most about
    n u Σ|term| in any order (Higham, Accuracy and Stability of Numerical Algorithms,
    §4.2): n counts the terms, one for the bias and two more for a complex product.
    """
    dtype = jnp.asarray(actual).dtype
    roundoff = float(jnp.finfo(dtype).eps) / 2
    accumulator = min(roundoff, float(jnp.finfo(jnp.float32).eps) / 2)
    tiny = float(
        jnp.finfo(dtype).smallest_normal
    )  # A subnormal may be flushed to zero.
    bound = (
        (terms + 3) * accumulator * magnitude + 2 * roundoff * np.abs(expected) + tiny
    )
    error = np.abs(wide(actual) - expected)
    assert actual.shape == expected.shape
    assert np.all(error <= bound), f"off by {np.max(error / bound):.3g} times the bound"


def relative_error(actual, expected):
    """The relative error in the Frobenius norm; zero where both are zero."""
    error = np.linalg.norm(wide(actual) - expected)
    return error and error / np.linalg.norm(expected)
