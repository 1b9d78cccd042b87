"""Rows: temporary memory and operations of programs in which something is mapped.

A row passes where neither is more than the naive formula's in float32, in which
products on CPU leave their accumulator.
"""

import jax
import jax.numpy as jnp
from oracle import naive
from transformations.losses import EVERY

ROWS, IN, OUT, MAPPED = 16, 128, 256, 32
TYPES = {"x": (ROWS, IN), "weight": (OUT, IN), "bias": (OUT,)}


def _mapped(axes, layer):
    return jax.vmap(layer, axes)


def _arguments(axes, dtype="float32"):
    """Types of x, weight and bias, mapped where ``axes`` has a number."""
    shapes = [list(shape) for shape in TYPES.values()]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis, MAPPED)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def _squares(layer):
    return lambda *a: jnp.sum(layer(*a).astype("float32") ** 2)


def _gradients(axes, layer):
    return jax.grad(_squares(_mapped(axes, layer)), EVERY), _arguments(axes)


def grad_of_vmap_over_x(layer):
    return _gradients((0, None, None), layer)


def grad_of_vmap_over_another_axis_of_x(layer):
    return _gradients((1, None, None), layer)


def grad_of_vmap_over_x_and_the_bias(layer):
    return _gradients((0, None, 0), layer)


def grad_of_vmap_over_the_parameters(layer):
    return _gradients((None, 0, 0), layer)


def grad_of_vmap_over_the_bias(layer):
    return _gradients((None, None, 0), layer)


def grad_of_vmap_over_every_argument(layer):
    return _gradients((0, 0, 0), layer)


def grad_of_nested_vmaps(layer):
    inner = jax.vmap(layer, (0, None, None))
    return _gradients((0, None, None), inner)


def grad_of_vmap_of_a_jitted_layer(layer):
    return _gradients((0, None, None), jax.jit(layer))


def jvp_of_vmap_over_x(layer):
    axes = 0, None, None
    return lambda *a: jax.jvp(_mapped(axes, layer), a, a), _arguments(axes)


def grad_of_jvp_of_vmap(layer):
    axes = 0, None, None

    def derivative(*a):
        return jax.jvp(_squares(_mapped(axes, layer)), a, a)[1]

    return jax.grad(derivative, EVERY), _arguments(axes)


def grad_of_grad_of_vmap(layer):
    axes = 0, None, None

    def norm(*a):
        gradients = jax.grad(_squares(_mapped(axes, layer)), EVERY)(*a)
        return sum(jnp.sum(g**2) for g in gradients)

    return jax.grad(norm, EVERY), _arguments(axes)


def vmap_of_grad_over_x(layer):
    axes = 0, None, None
    return _mapped(axes, jax.grad(_squares(layer), EVERY)), _arguments(axes)


def _costs(row, layer):
    function, arguments = row(layer)
    compiled = jax.jit(function).lower(*arguments).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return memory.temp_size_in_bytes, cost["flops"]


def check(row, layer):
    """Raise an AssertionError if the layer costs more than the naive formula."""
    ours, limits = _costs(row, layer), _costs(row, naive)
    for name, cost, limit in zip(("bytes", "operations"), ours, limits, strict=True):
        # Alignment costs a few bytes, and a cast a few operations.
        assert cost <= 1.02 * limit + 4096, f"{cost / limit:.0f} times the {name}"
