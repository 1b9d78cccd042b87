"""Gradients accumulated in references, as the page on scale has it, and as usual."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_array, relative_error, wide

import jaxlinear

LAYERS, WIDTH, ROWS, MICROBATCHES = 4, 256, 16, 64
EPS = float(jnp.finfo("float32").eps)


def loss(parameters, x):
    def layer(x, parameters):
        return jaxlinear.linear(x, *parameters, dtype="bfloat16"), None

    y, _ = jax.lax.scan(layer, x, parameters)
    return jnp.sum(y.astype("float32"))


def usual(parameters, microbatches):
    def add(total, x):
        gradients = jax.grad(loss)(parameters, x)
        return jax.tree.map(jnp.add, total, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return jax.lax.scan(add, zeros, microbatches)[0]


def in_references(parameters, microbatches):
    total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), parameters)

    def add(_, x):
        _, vjp = jax.vjp(lambda p: loss(p, x), parameters)
        vjp.with_refs(total)(1.0)
        return None, None

    jax.lax.scan(add, None, microbatches)
    return jax.tree.map(lambda ref: ref[...], total)


@pytest.fixture(scope="module")
def problem():
    weight = random_array(0, (LAYERS, WIDTH, WIDTH), "float32") / WIDTH**0.5
    bias = random_array(1, (LAYERS, WIDTH), "float32")
    return (weight, bias), random_array(2, (MICROBATCHES, ROWS, WIDTH), "bfloat16")


def test_a_reference_saves_a_buffer_of_all_gradients(problem):
    temporary = {
        f: jax.jit(f).lower(*problem).compile().memory_analysis().temp_size_in_bytes
        for f in (usual, in_references)
    }
    size = sum(p.nbytes for p in jax.tree.leaves(problem[0]))
    assert temporary[usual] - temporary[in_references] >= 0.7 * size


def test_64_microbatches_are_as_accurate_in_a_reference(problem):
    parameters, microbatches = problem
    # The last layer's gradients in float64, of the operands that are multiplied.
    x = microbatches
    for i in range(LAYERS - 1):
        x = jaxlinear.linear(x, *(p[i] for p in parameters), dtype="bfloat16")
    G = np.ones((MICROBATCHES * ROWS, WIDTH))
    exact = G.T @ wide(x).reshape(-1, WIDTH)
    for accumulate in usual, in_references:
        weight, bias = jax.jit(accumulate)(*problem)
        assert weight.dtype == bias.dtype == jnp.float32
        assert relative_error(weight[-1], exact) <= 8 * EPS
        assert relative_error(bias[-1], G.sum(0)) <= 8 * EPS
