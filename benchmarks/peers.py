"""The same layer as each library writes it.

A peer is a function of its parameters, a weight and perhaps a bias, of x, the compute
dtype and, where devices share the result, its sharding. The weight is (out, in), or
(in, out) for the libraries in ``TRANSPOSED``. PyTorch is in ``benchmarks.pytorch``.
"""

import importlib.util

import jax
import jax.numpy as jnp

import jaxlinear
from benchmarks.results_file import AGAIN, NAIVE, OURS


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
    OURS: ("jaxlinear", ours),
    NAIVE: ("jax", naive),
    AGAIN: ("jax", naive),
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
