"""The same layer as each library writes it.

Each function takes weight (out, in), bias (out,) and the compute dtype, and returns the
function ``apply(parameters, x)`` and the parameters in the library's own layout. Those
of libraries that are not installed are left out.
"""

import importlib.util

import jax
import jax.numpy as jnp

import jaxlinear
from benchmarks.timing import eager


def ours(weight, bias, dtype, products=None):
    def apply(parameters, x):
        return jaxlinear.linear(x, *parameters, dtype=dtype, products=products)

    return apply, (weight, bias)


def naive(weight, bias, dtype):
    def apply(parameters, x):
        weight, bias = (p.astype(dtype) for p in parameters)
        return x.astype(dtype) @ weight.T + bias

    return apply, (weight, bias)


def plain_custom_vjp(weight, bias, dtype):
    """The three formulas as one writes them first."""

    @jax.custom_vjp
    def layer(x, weight, bias):
        return x @ weight.T + bias

    def forward(x, weight, bias):
        return layer(x, weight, bias), (x, weight)

    def backward(residuals, G):
        x, weight = residuals
        G_rows, x_rows = G.reshape(-1, G.shape[-1]), x.reshape(-1, x.shape[-1])
        return G @ weight, G_rows.T @ x_rows, G_rows.sum(0)

    layer.defvjp(forward, backward)

    def apply(parameters, x):
        return layer(x.astype(dtype), *(p.astype(dtype) for p in parameters))

    return apply, (weight, bias)


def flax_nnx(weight, bias, dtype):
    from flax import nnx

    out_features, in_features = weight.shape
    layer = nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        param_dtype=weight.dtype,
        rngs=nnx.Rngs(0),
    )
    layer.kernel, layer.bias = nnx.Param(weight.T), nnx.Param(bias)
    graph, parameters = nnx.split(layer)

    def apply(parameters, x):
        return nnx.merge(graph, parameters)(x)

    return apply, parameters


def flax_linen(weight, bias, dtype):
    from flax import linen

    layer = linen.Dense(weight.shape[0], dtype=dtype, param_dtype=weight.dtype)

    def apply(parameters, x):
        return layer.apply({"params": parameters}, x)

    return apply, {"kernel": weight.T, "bias": bias}


def equinox(weight, bias, dtype):
    import equinox as eqx

    out_features, in_features = weight.shape
    layer = eqx.nn.Linear(in_features, out_features, key=jax.random.key(0))

    def apply(parameters, x):
        parameters = tuple(p.astype(dtype) for p in parameters)
        filled = eqx.tree_at(
            lambda layer: (layer.weight, layer.bias), layer, parameters
        )
        for _ in x.shape[:-1]:
            filled = jax.vmap(filled)
        return filled(x.astype(dtype))

    return apply, (weight, bias)


def haiku(weight, bias, dtype):
    import haiku as hk

    def linear(x):
        return hk.Linear(weight.shape[0], name="layer")(x)

    layer = hk.without_apply_rng(hk.transform(linear))

    def apply(parameters, x):
        cast = {name: p.astype(dtype) for name, p in parameters.items()}
        return layer.apply({"layer": cast}, x.astype(dtype))

    return apply, {"w": weight.T, "b": bias}


CONTENDERS = {
    "jaxlinear": ("jaxlinear", ours),
    "naive formula": ("jax", naive),
    "plain custom_vjp": ("jax", plain_custom_vjp),
    "Flax NNX": ("flax", flax_nnx),
    "Flax Linen": ("flax", flax_linen),
    "Equinox": ("equinox", equinox),
    "Haiku": ("haiku", haiku),
}
"""Name in the tables: the module that it needs, and the layer. The first is ours."""

TRANSPOSED = {"Flax NNX", "Flax Linen", "Haiku"}
"""The libraries whose weight is (in, out)."""


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def jax_contenders():
    return {
        name: layer
        for name, (module, layer) in CONTENDERS.items()
        if is_installed(module)
    }


def pytorch_runs(device, dtype):
    """Whether PyTorch is here and worth the wait.

    On CPU it takes a second for what takes the others a fiftieth in float16.
    """
    too_slow = device.platform == "cpu" and dtype == "float16"
    return is_installed("torch") and device.platform in ("cpu", "gpu") and not too_slow


def pytorch_tensor(array, device):
    """A NumPy array, of bfloat16 too, on PyTorch's name for a JAX device."""
    import torch

    place = "cuda" if device.platform == "gpu" else "cpu"
    wide = torch.from_numpy(array.astype("float32"))  # It reads no bfloat16.
    return wide.to(place, getattr(torch, jnp.dtype(array.dtype).name))


def pytorch_program(call, device):
    """A program whose results are waited for on the device."""
    import torch

    return (
        eager(call, torch.cuda.synchronize) if device.platform == "gpu" else eager(call)
    )


def pytorch_programs(arrays, dtype, device):
    """The same in eager PyTorch, mode by mode; the gradients without the forward."""
    import torch
    from torch.nn.functional import linear

    tensors = (pytorch_tensor(array, device).requires_grad_() for array in arrays)
    x, weight, bias, cotangent = tensors
    compute_dtype = getattr(torch, dtype)
    mixed = weight.dtype != compute_dtype

    def forward():
        with torch.autocast(x.device.type, compute_dtype, enabled=mixed):
            return linear(x, weight, bias)

    kept = forward()

    def gradient(of):
        grads = torch.autograd.grad(kept, of, cotangent, retain_graph=True)
        return list(grads)

    def without_graph():
        with torch.no_grad():
            return [forward()]

    def step():
        Y = forward()
        return [Y, *torch.autograd.grad(Y, (x, weight, bias), cotangent)]

    calls = {
        "forward": without_graph,
        "input gradient": lambda: gradient(x),
        "weight gradient": lambda: gradient(weight),
        "bias gradient": lambda: gradient(bias),
        "step": step,
    }
    return {mode: pytorch_program(call, device) for mode, call in calls.items()}
