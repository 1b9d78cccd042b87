"""Float32 gradients under bfloat16 compute, where autodiff rounds them to bfloat16."""

import functools

import jax
import jax.numpy as jnp
import pytest
from compiled import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import exact, naive, relative_error

from jaxlinear import Product, Products, linear

ROWS, IN, OUT = 4096, 512, 512
REDUCED_IN_BFLOAT16 = Products(weight_grad=Product(preferred_element_type="bfloat16"))


def flax_linear(x, weight, bias, dtype):
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(IN, OUT, dtype=dtype, rngs=nnx.Rngs(0))
    layer.kernel.set_value(weight.T)
    layer.bias.set_value(bias)
    return layer(x)


@functools.cache
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (ROWS, IN))
    weight = jax.random.uniform(keys[1], (OUT, IN), minval=-0.04, maxval=0.04)
    bias = jax.random.uniform(keys[2], (OUT,), minval=-0.04, maxval=0.04)
    cotangent = jax.random.normal(keys[3], (ROWS, OUT), "bfloat16")
    rounded = [a.astype("bfloat16") for a in (x, weight, bias)]
    expected = [value for value, _ in exact(*rounded, cotangent)]
    return (x, weight, bias, cotangent), expected[2:]


def parameter_gradients(layer, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows, replicated = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ())
    )

    @functools.partial(
        jax.jit,
        in_shardings=(rows, replicated, replicated, rows),
        out_shardings=replicated,
    )
    def gradients(x, weight, bias, cotangent):
        def of_parameters(weight, bias):
            return layer(x, weight, bias, dtype="bfloat16")

        return jax.vjp(of_parameters, weight, bias)[1](cotangent)

    return gradients


@pytest.mark.parametrize("devices", [1, 8])
def test_parameter_gradients_keep_float32_accuracy_under_bfloat16_compute(devices):
    arguments, expected = problem()
    gradients = parameter_gradients(linear, devices)(*arguments)
    for actual, want in zip(gradients, expected, strict=True):
        assert actual.dtype == jnp.float32
        assert relative_error(actual, want) < 1e-5


def test_weight_gradient_that_is_reduced_in_bfloat16_has_the_error_of_autodiff():
    arguments, (expected, _) = problem()
    reduced_in_bfloat16 = functools.partial(linear, products=REDUCED_IN_BFLOAT16)
    ours, autodiff = (
        relative_error(parameter_gradients(layer, 8)(*arguments)[0], expected)
        for layer in (reduced_in_bfloat16, naive)
    )
    assert ours == pytest.approx(autodiff, rel=1e-3)


@pytest.mark.parametrize("layer", [naive, flax_linear], ids=["naive", "flax"])
def test_autodiff_rounds_parameter_gradients_to_bfloat16_on_eight_devices(layer):
    # Why the test above proves something. On one device XLA may keep more precision
    # than the program asks for; across devices it must reduce what the program says.
    arguments, expected = problem()
    gradients = parameter_gradients(layer, devices=8)(*arguments)
    for actual, want in zip(gradients, expected, strict=True):
        assert relative_error(actual, want) > 5e-4


def test_weight_gradient_is_reduced_across_devices_in_float32():
    arguments, _ = problem()
    compiled = parameter_gradients(linear, devices=8).lower(*arguments).compile()
    sent = [("all-reduce", "f32", 4 * OUT), ("all-reduce", "f32", 4 * OUT * IN)]
    assert collectives(compiled) == sent
