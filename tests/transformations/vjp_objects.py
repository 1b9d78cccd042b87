"""Rows: the VJP object, a pytree of what is kept that ``jax.vjp`` returns."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def _pull_back(vjp, G):
    return vjp(G)


def saveable_args(layer, x, weight, bias):
    """The weight is not saved, and put back for the backward pass."""
    Y, vjp = jax.vjp(layer, x, weight, bias, saveable_args=(True, False, True))
    vjp.args_res[1] = weight
    return Y, vjp(jnp.cos(Y))


def saveable_args_under_checkpoint(layer, x, weight, bias):
    """Also what is saved: x, and no cast of the weight."""
    apply = jax.checkpoint(layer)
    Y, vjp = jax.vjp(apply, x, weight, bias, saveable_args=(True, False, True))
    saved = jax.tree.leaves(vjp)
    vjp.args_res[1] = weight
    return Y, saved, vjp(jnp.cos(Y))


def in_nzs(layer, *arrays):
    """The tangent of x is declared zero, and so is ∇X."""
    Y, vjp = jax.vjp(layer, *arrays, in_nzs=(False, True, True))
    return Y, vjp(jnp.cos(Y))


def fwd_and_bwd(layer, *arrays):
    forward, backward = jax.fwd_and_bwd(layer, (0, 1))
    Y, residuals = forward(*arrays)
    return Y, backward(residuals, jnp.cos(Y))


def with_refs(layer, *arrays):
    """The gradients are added to references."""
    Y, vjp = jax.vjp(layer, *arrays)
    references = [jax.new_ref(jnp.ones_like(a)) for a in arrays]
    vjp.with_refs(*references)(jnp.cos(Y))
    return [reference[...] for reference in references]


def with_logs(layer, *arrays):
    """Another rule logs what the layer returns as ∇X."""

    @jax.custom_vjp
    def logged(x):
        return x

    logged.defvjp_with_logs(lambda x: (x, None), lambda _, G: ((G,), {"∇X": G}))
    Y, vjp = jax.vjp(lambda x, *others: layer(logged(x), *others), *arrays)
    return vjp.with_logs(jnp.cos(Y))


def vjp_object_through_jit(layer, *arrays):
    Y, vjp = jax.jit(functools.partial(jax.vjp, layer))(*arrays)
    return Y, jax.jit(_pull_back)(vjp, jnp.cos(Y))


def vjp_object_through_vmap(layer, *arrays):
    Y, vjp = jax.vmap(functools.partial(jax.vjp, layer), (1, None, None))(*arrays)
    return Y, jax.vmap(_pull_back)(vjp, jnp.cos(Y))


def vjp_object_through_scan(layer, x, weight, bias):
    """The forward passes of all microbatches, and then the backward passes."""

    def forward(_, x):
        return None, jax.vjp(layer, x, weight, bias)

    def backward(sums, microbatch):
        grad_x, *gradients = _pull_back(*microbatch)
        return jax.tree.map(jnp.add, sums, gradients), grad_x

    _, (Y, vjps) = lax.scan(forward, None, x)
    zeros = [jnp.zeros_like(weight), jnp.zeros_like(bias)]
    return lax.scan(backward, zeros, (vjps, jnp.cos(Y)))
