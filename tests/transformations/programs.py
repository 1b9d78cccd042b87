"""Rows: control flow, rematerialisation, compilation and export."""

import jax
import jax.numpy as jnp
from jax import export, lax
from transformations.losses import EVERY, loss

import jaxlinear


def _square(x, weight, bias):
    """As many features in as out, and no larger values out than in."""
    return x[..., :8], weight[:, :8] / 4, bias


def _steps(layer):
    """Three layers in a row, of one weight."""

    def apply(x, weight, bias):
        def step(x, _):
            return jnp.sin(layer(x, weight, bias)).astype(x.dtype), None

        return lax.scan(step, x, length=3)[0]

    return apply


def jit(layer, *arrays):
    return jax.jit(layer)(*arrays), jax.jit(jax.grad(loss(layer), EVERY))(*arrays)


def without_jit(layer, *arrays):
    with jax.disable_jit():
        return layer(*arrays), jax.grad(loss(layer), EVERY)(*arrays)


def scan(layer, *arrays):
    return jax.grad(loss(_steps(layer)), EVERY)(*_square(*arrays))


def scan_over_stacked_layers(layer, *arrays):
    x, weight, bias = _square(*arrays)
    weights, biases = jnp.stack([weight, -weight]), jnp.stack([bias, 2 * bias])

    def stack(x, weights, biases):
        def step(x, parameters):
            return jnp.sin(layer(x, *parameters)).astype(x.dtype), None

        return lax.scan(step, x, (weights, biases))[0]

    return jax.jit(jax.grad(loss(stack), EVERY))(x, weights, biases)


def while_loop(layer, *arrays):
    x, weight, bias = _square(*arrays)

    def step(state):
        i, x = state
        return i + 1, jnp.sin(layer(x, weight, bias)).astype(x.dtype)

    return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]


def grad_in_a_while_loop(layer, *arrays):
    def step(state):
        i, arrays = state
        gradients = jax.grad(loss(layer), EVERY)(*arrays)
        return i + 1, tuple(a - g / 500 for a, g in zip(arrays, gradients, strict=True))

    return lax.while_loop(lambda state: state[0] < 3, step, (0, arrays))[1]


def cond(layer, *arrays):
    x, weight, bias = _square(*arrays)

    def gradients(chosen):
        def either(x, weight, bias):
            def apply(x):
                return layer(x, weight, bias).astype(x.dtype)

            return lax.cond(chosen, apply, jnp.sin, x)

        return jax.grad(loss(either), EVERY)(x, weight, bias)

    return jax.jit(gradients)(True), jax.jit(gradients)(False)


def _remat(policy, layer, *arrays):
    apply = jax.checkpoint(_steps(layer), policy=policy)
    return jax.jit(jax.grad(loss(apply), EVERY))(*_square(*arrays))


def remat(layer, *arrays):
    return _remat(None, layer, *arrays)


def remat_that_saves_products(layer, *arrays):
    return _remat(jax.checkpoint_policies.dots_saveable, layer, *arrays)


def remat_that_saves_everything(layer, *arrays):
    return _remat(jax.checkpoint_policies.everything_saveable, layer, *arrays)


def remat_that_saves_linear_outputs(layer, *arrays):
    return _remat(jaxlinear.save_linear_outputs, layer, *arrays)


def eval_shape(layer, *arrays):
    def of_shape(tree):
        return jax.tree.map(lambda a: jnp.ones(a.shape), tree)

    shapes = jax.eval_shape(jax.grad(loss(layer), EVERY), *arrays)
    return of_shape(jax.eval_shape(layer, *arrays)), of_shape(shapes)


def compilation_ahead_of_time(layer, *arrays):
    return jax.jit(jax.grad(loss(layer), EVERY)).lower(*arrays).compile()(*arrays)


def donation(layer, *arrays):
    gradients = jax.jit(jax.grad(loss(layer), EVERY), donate_argnums=EVERY)
    return gradients(*(jnp.array(a) for a in arrays))


def _exported(function, *specifications):
    platforms = ("cpu", "cuda", "rocm", "tpu")
    exported = export.export(jax.jit(function), platforms=platforms)(*specifications)
    return export.deserialize(exported.serialize(vjp_order=1))


def exported_for_every_platform(layer, *arrays):
    restored = _exported(layer, *arrays)
    Y, pull_back = jax.vjp(restored.call, *arrays)
    return Y, pull_back(jnp.cos(Y))


def exported_with_symbolic_leading_axes(layer, x, weight, bias):
    leading = export.symbolic_shape("batch, length")
    any_x = jax.ShapeDtypeStruct((*leading, x.shape[-1]), x.dtype)
    gradients = jax.grad(loss(layer), EVERY)
    return _exported(gradients, any_x, weight, bias).call(x, weight, bias)
