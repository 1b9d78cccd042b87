"""Rematerialisation: which products a compiled backward pass runs."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from lowered import products_run
from oracle import naive, random_array

import jaxlinear
from jaxlinear import linear

LAYERS, WIDTH, ROWS = 3, 32, 16
BACKWARD = 2 * LAYERS  # An input and a weight gradient for each layer.

NOTHING = jax.checkpoint_policies.nothing_saveable
PRODUCTS = jax.checkpoint_policies.dots_saveable
OUTPUTS = jaxlinear.save_linear_outputs


def small_network(layer, policy):
    """A network under ``jax.checkpoint``, and its arguments."""
    weights = [random_array(i, (WIDTH, WIDTH), "float32") for i in range(LAYERS)]
    biases = [random_array((i, 1), (WIDTH,), "float32") for i in range(LAYERS)]
    x = random_array(LAYERS, (ROWS, WIDTH), "float32")

    @functools.partial(jax.checkpoint, policy=policy)
    def network(x, weights, biases):
        for weight, bias in zip(weights, biases, strict=True):
            x = jnp.tanh(layer(x, weight, bias).astype(x.dtype))
        return x

    return network, (x, weights, biases)


def products_of_backward(layer, policy):
    """How many products there are in the compiled backward pass."""
    network, arguments = small_network(layer, policy)
    Y, vjp = jax.vjp(network, *arguments)
    compiled = jax.jit(lambda vjp, G: vjp(G)).lower(vjp, Y).compile()
    return len(re.findall(r" dot\(", compiled.as_text()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_policy_saves_the_outputs_and_no_forward_product_runs_again(dtype):
    layer = functools.partial(linear, dtype=dtype)
    assert products_of_backward(layer, NOTHING) == BACKWARD + LAYERS
    assert products_of_backward(layer, OUTPUTS) == BACKWARD


def test_our_policy_saves_the_output_of_a_frozen_layer():
    x, weight = random_array(0, (ROWS, WIDTH), "float32"), jnp.ones((WIDTH, WIDTH))

    @functools.partial(jax.checkpoint, policy=OUTPUTS)
    def network(last):
        return jnp.tanh(linear(jnp.tanh(linear(x, weight)), last))

    Y, vjp = jax.vjp(network, weight)
    compiled = jax.jit(lambda vjp, G: vjp(G)).lower(vjp, Y).compile()
    assert len(re.findall(r" dot\(", compiled.as_text())) == 1


@pytest.mark.parametrize("layer", [linear, naive])
def test_policies_for_products_see_those_of_float32(layer):
    assert products_of_backward(layer, PRODUCTS) == BACKWARD


def products_on_tpu(layer, policy):
    """How many products a forward and backward pass asks a TPU for."""
    network, arguments = small_network(layer, policy)

    def passes(*arguments):
        Y, vjp = jax.vjp(network, *arguments)
        return vjp(Y)

    return products_run(passes, *arguments, platform="tpu")


# On CPU they do not see them: the form that runs there is inside a `custom_vmap`.
@pytest.mark.parametrize("layer", [linear, naive])
def test_policies_for_products_see_those_of_bfloat16_on_accelerators(layer):
    layer = functools.partial(layer, dtype="bfloat16")
    assert products_on_tpu(layer, NOTHING) == BACKWARD + 2 * LAYERS
    assert products_on_tpu(layer, PRODUCTS) == BACKWARD + LAYERS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_policy_for_products_saves_ours_in_every_dtype(has_bias, dtype, capsys):
    x, weight = jnp.ones((16, 64)), jnp.ones((64, 64))
    bias = jnp.ones(64) if has_bias else None

    def block(x):
        for _ in range(2):
            x = jnp.tanh(linear(x, weight, bias, dtype=dtype)).astype("float32")
        return x

    saved = jax.checkpoint_policies.dots_saveable
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(block, policy=saved), x)
    assert capsys.readouterr().out.count("[16,64] output of jitted function") >= 2
