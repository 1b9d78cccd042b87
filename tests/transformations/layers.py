"""The same layer written in eight ways, each a function of its arrays."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from oracle import naive

import jaxlinear.linen
import jaxlinear.nnx


@jax.custom_vjp
def _plain_rule(x, weight, bias):
    return naive(x, weight, bias)


def _plain_forward(x, weight, bias):
    return naive(x, weight, bias), (x, weight, bias is None)


def _plain_backward(residuals, G):
    x, weight, no_bias = residuals
    leading = tuple(range(G.ndim - 1))
    grad_weight = jnp.tensordot(G, x, (leading, leading))
    return G @ weight, grad_weight, None if no_bias else G.sum(leading)


_plain_rule.defvjp(_plain_forward, _plain_backward)


def plain_custom_vjp(x, weight, bias=None, dtype=None, out_sharding=None):
    """The rule as tutorials write it: no `out_sharding`, and the casts outside."""
    arrays = (x, weight, bias)
    if dtype is not None:
        arrays = jax.tree.map(lambda a: a.astype(dtype), arrays)
    return _plain_rule(*arrays)


def in_nnx(x, weight, bias=None, dtype=None, out_sharding=None):
    options = {"use_bias": bias is not None, "dtype": dtype}
    module = nnx.eval_shape(
        lambda: jaxlinear.nnx.Linear(*weight.shape[::-1], rngs=nnx.Rngs(0), **options)
    )
    module.weight = nnx.Param(weight)
    if bias is not None:
        module.bias = nnx.Param(bias)
    return module(x, out_sharding=out_sharding)


def in_linen(x, weight, bias=None, dtype=None, out_sharding=None):
    module = jaxlinear.linen.Linear(weight.shape[0], bias is not None, dtype)
    params = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return module.apply({"params": params}, x, out_sharding)


LINEAR, NAIVE, PLAIN = "`linear`", "`x @ w.T + b`", "plain `custom_vjp`"
LAYERS = {
    LINEAR: jaxlinear.linear,
    NAIVE: naive,
    PLAIN: plain_custom_vjp,
    "bfloat16": functools.partial(jaxlinear.linear, dtype="bfloat16"),
    "float8": functools.partial(jaxlinear.linear, products=jaxlinear.FLOAT8),
    "int8": functools.partial(jaxlinear.linear, products=jaxlinear.INT8),
    "nnx": in_nnx,
    "linen": in_linen,
}
