"""The results of PyTorch's linear layer, as it was recorded."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import output_and_gradients, wide

from jaxlinear import linear

GOLDEN = pathlib.Path(__file__).parent / "golden" / "pytorch_linear.npz"
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


@functools.cache
def golden():
    """{(dtype, sample): {name: array}}, in float64 or complex128."""
    samples = {}
    with np.load(GOLDEN) as arrays:
        for key in arrays.files:
            if "/" in key:
                dtype, sample, name = key.split("/")
                samples.setdefault((dtype, int(sample)), {})[name] = arrays[key]
    return samples


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", range(18))
def test_output_and_gradients_are_those_that_pytorch_recorded(dtype, sample):
    recorded = golden()[dtype, sample]
    with jax.enable_x64(dtype in ("float64", "complex128")):
        x, weight, bias, cotangent = (
            jnp.asarray(recorded[name], dtype) if name in recorded else None
            for name in ("x", "weight", "bias", "cotangent")
        )
        if dtype.startswith("complex"):
            # PyTorch's gradient is the conjugate of JAX's, for the conjugate cotangent.
            cotangent = cotangent.conj()
        results = output_and_gradients(linear, x, weight, bias, cotangent)
    # The inputs are eighths below 2: a product and its few sums are exact in float32.
    unit = float(jnp.finfo(dtype).eps)
    names = "y", "grad_x", "grad_weight", "grad_bias"
    for name, actual in zip(names, results, strict=True):
        if name in recorded:
            expected = recorded[name]
            if name != "y":
                expected = expected.conj()
            assert actual.dtype == dtype
            np.testing.assert_allclose(wide(actual), expected, rtol=unit, atol=unit)
        else:
            assert bias is None
            assert actual is None
