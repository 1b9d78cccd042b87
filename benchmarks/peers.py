"""The same layer as each library writes it.

A peer is a function of its parameters, a weight and perhaps a bias, of x, the compute
dtype and, where devices share the result, its sharding. The weight is (out, in), or
(in, out) for the libraries in ``TRANSPOSED``. PyTorch has its own programs.
"""

import importlib.util

import jax
import jax.numpy as jnp

import jaxlinear
from benchmarks.timing import eager


def ours(parameters, x, dtype, out_sharding=None, products=None):
    options = {"dtype": dtype, "products": products, "out_sharding": out_sharding}
    return jaxlinear.linear(x, *parameters, **options)


def naive(parameters, x, dtype, out_sharding=None):
    weight, *bias = (p.astype(dtype) for p in parameters)
    y = jnp.matmul(x.astype(dtype), weight.T, out_sharding=out_sharding)
    return y + bias[0] if bias else y


@jax.custom_vjp
def _three_formulas(x, weight, bias):
    return x @ weight.T + bias


def _forward(x, weight, bias):
    return _three_formulas(x, weight, bias), (x, weight)


def _backward(residuals, G):
    x, weight = residuals
    G_rows, x_rows = G.reshape(-1, G.shape[-1]), x.reshape(-1, x.shape[-1])
    return G @ weight, G_rows.T @ x_rows, G_rows.sum(0)


_three_formulas.defvjp(_forward, _backward)


def plain_custom_vjp(parameters, x, dtype):
    """The three formulas as one writes them first."""
    return _three_formulas(x.astype(dtype), *(p.astype(dtype) for p in parameters))


def flax_nnx(parameters, x, dtype, out_sharding=None):
    from flax import nnx

    kernel, *bias = parameters

    def empty():
        options = {"use_bias": bool(bias), "dtype": dtype, "rngs": nnx.Rngs(0)}
        return nnx.Linear(*kernel.shape, **options)

    layer = nnx.eval_shape(empty)
    layer.kernel = nnx.Param(kernel)
    if bias:
        layer.bias = nnx.Param(bias[0])
    return layer(x, out_sharding=out_sharding)


def flax_linen(parameters, x, dtype):
    from flax import linen

    kernel, bias = parameters
    layer = linen.Dense(kernel.shape[1], dtype=dtype)
    return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)


def equinox(parameters, x, dtype):
    import equinox as eqx

    weight, bias = (p.astype(dtype) for p in parameters)
    out_features, in_features = weight.shape
    layer = eqx.nn.Linear(in_features, out_features, key=jax.random.key(0))
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, bias))
    for _ in x.shape[:-1]:
        layer = jax.vmap(layer)
    return layer(x.astype(dtype))


def haiku(parameters, x, dtype):
    import haiku as hk

    w, b = (p.astype(dtype) for p in parameters)
    layer = hk.transform(lambda x: hk.Linear(w.shape[1], name="layer")(x))
    return layer.apply({"layer": {"w": w, "b": b}}, None, x.astype(dtype))


PEERS = {
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


def is_installed(module):
    return importlib.util.find_spec(module) is not None


def jax_peers():
    return {
        name: layer for name, (module, layer) in PEERS.items() if is_installed(module)
    }


def parameters_of(name, weight, bias):
    """The parameters of a peer, from a weight (out, in)."""
    return (weight.T if name in TRANSPOSED else weight), bias


# PyTorch, eager.


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
    """The layer in eager PyTorch, mode by mode; the gradients without the forward."""
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
