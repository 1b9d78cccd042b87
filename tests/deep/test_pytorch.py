"""PyTorch's linear layer: its recorded results, and the layer where installed."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    assert_rounded_once,
    exact,
    output_and_gradients,
    random_problem,
    wide,
)

from jaxlinear import linear
from jaxlinear._flax.parameters import uniform

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pytorch_linear.npz"
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 4)], ids=str)
def test_output_and_gradients_are_those_of_pytorch_live(dtype, leading):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer = torch.nn.Linear(64, 48, dtype=getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        x, weight, bias, cotangent = random_problem(leading, 64, 48, dtype)

        def tensor(array):
            return torch.from_numpy(wide(array)).to(layer.weight.dtype)

        layer.load_state_dict({"weight": tensor(weight), "bias": tensor(bias)})
        torch_x = tensor(x).requires_grad_()
        y = layer(torch_x)
        y.backward(tensor(cotangent))
        theirs = (y, torch_x.grad, layer.weight.grad, layer.bias.grad)
        ours = output_and_gradients(linear, x, weight, bias, cotangent)
        rows = int(np.prod(leading))
        expected = exact(x, weight, bias, cotangent)
        # Both are the same sums of at most 64 terms, rounded: judge both by float64.
        for mine, other, (want, magnitude), terms in zip(
            ours, theirs, expected, (64, 48, rows, rows), strict=True
        ):
            assert_rounded_once(mine, want, magnitude, terms)
            assert mine.shape == tuple(other.shape)
            other = other.detach().to(torch.float64).numpy()
            # PyTorch may round partial sums to the dtype: one rounding for each term.
            roundoff = float(jnp.finfo(dtype).eps) / 2
            assert np.all(
                np.abs(wide(mine) - other) <= (terms + 3) * roundoff * magnitude
            )


def test_initial_bound_is_that_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for in_features in (1, 7, 400):
        theirs = torch.nn.Linear(in_features, 20_000)
        ours = uniform(in_features)(jax.random.key(0), (20_000, in_features))
        for values in (theirs.weight, theirs.bias):
            largest = values.abs().max().item()
            assert float(jnp.max(jnp.abs(ours))) == pytest.approx(largest, rel=1e-3)
