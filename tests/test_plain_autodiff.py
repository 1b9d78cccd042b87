"""The switch to the naive formula: what it changes, and that it leaks nowhere."""

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import naive, random_problem

from jaxlinear import linear, plain_autodiff


def arguments(dtype="float32"):
    return random_problem((5,), 4, 3, dtype)[:3]


def tangent(function):
    """The forward-mode derivative of ``function(x, weight, bias)``, along itself."""
    return jax.jvp(function, arguments(), arguments())[1]


def primitives(function, *arguments):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(function)(*arguments).eqns]


def is_on():
    return primitives(linear, *arguments())[0] == "dot_general"


def test_inside_a_float32_layer_is_one_product_and_one_sum():
    with plain_autodiff():
        found = primitives(linear, *arguments())
    assert found == ["dot_general", "broadcast_in_dim", "add"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inside_values_and_gradients_are_bit_for_bit_those_of_the_naive_formula(dtype):
    def values(layer):
        Y, vjp = jax.vjp(functools.partial(layer, dtype=dtype), *arguments())
        return Y, *vjp(Y)

    with plain_autodiff():
        actual = values(linear)
    for ours, expected in zip(actual, values(naive), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_it_is_off_again_after_the_block_nested_blocks_and_exceptions():
    assert not is_on()
    with plain_autodiff():
        with plain_autodiff():
            assert is_on()
        assert is_on()
        with pytest.raises(KeyError), plain_autodiff():
            raise KeyError
        assert is_on()
    assert not is_on()


def test_it_decorates_a_function():
    @plain_autodiff()
    def derivative():
        return tangent(linear)

    for _ in range(2):
        np.testing.assert_array_equal(derivative(), tangent(naive))
        assert not is_on()


@pytest.mark.parametrize("first", [True, False])
def test_a_jitted_function_is_traced_once_for_each_side(first):
    traces = []

    @jax.jit
    def layer(x, weight, bias):
        traces.append(None)
        return linear(x, weight, bias)

    def call(inside):
        with plain_autodiff() if inside else contextlib.nullcontext():
            np.testing.assert_allclose(tangent(layer), tangent(naive), rtol=1e-5)

    for inside in [first, not first] * 3:
        call(inside)
    assert len(traces) == 2


def test_gradients_outside_are_those_of_the_rule_after_a_call_inside():
    x, weight, bias = arguments()

    @jax.grad
    def gradient(weight):
        return jnp.sum(linear(x, weight, bias, dtype="bfloat16").astype("float32"))

    with plain_autodiff():
        rounded = gradient(weight)
    kept = gradient(weight)
    np.testing.assert_array_equal(rounded, rounded.astype("bfloat16"))
    assert np.any(kept != kept.astype("bfloat16").astype("float32"))


def test_threads_do_not_share_the_setting():
    inside, outside = threading.Event(), threading.Event()
    found = {}

    def enter():
        with plain_autodiff():
            inside.set()
            outside.wait(timeout=60)
            found["inside"] = is_on()

    thread = threading.Thread(target=enter)
    thread.start()
    assert inside.wait(timeout=60)
    found["outside"] = is_on()
    outside.set()
    thread.join()
    assert found == {"inside": True, "outside": False}


def test_derivatives_taken_inside_work_outside():
    with plain_autodiff():
        _, push_forward = jax.linearize(linear, *arguments())
    np.testing.assert_allclose(
        push_forward(*arguments()), tangent(naive), rtol=1e-5, atol=1e-6
    )
