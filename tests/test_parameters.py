"""The initial parameters: U(-√k, √k), k = 1/in_features, in every dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from jax.sharding import NamedSharding, PartitionSpec
from oracle import wide

from jaxlinear import linen, nnx

flax_nnx = pytest.importorskip("flax.nnx")

DTYPES = ["float8_e4m3fn", "bfloat16", "float16", "float32", "float64"]


def nnx_parameters(in_features, out_features, seed=0, **options):
    rngs = flax_nnx.Rngs(seed)
    layer = nnx.Linear(in_features, out_features, rngs=rngs, **options)
    return layer.weight[...], layer.bias[...]


def linen_parameters(in_features, out_features, seed=0, **options):
    layer = linen.Linear(out_features, **options)
    x = jnp.zeros(in_features, options.get("param_dtype", "float32"))
    parameters = layer.init(jax.random.key(seed), x)["params"]
    return parameters["weight"], parameters["bias"]


each_api = pytest.mark.parametrize("parameters", [nnx_parameters, linen_parameters])


def kolmogorov_distance(values, bound):
    """The largest gap between the distribution of ``values`` and U(-bound, bound)."""
    values = np.sort(values)
    uniform = (values / bound + 1) / 2
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.max(steps[1:] - uniform), np.max(uniform - steps[:-1]))


@each_api
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [3, 1000])
def test_every_value_is_inside_the_bound_in_every_dtype(parameters, dtype, in_features):
    bound = math.sqrt(1 / in_features)
    with jax.enable_x64(dtype == "float64"):
        for values in parameters(in_features, 500, param_dtype=dtype):
            assert values.dtype == dtype
            assert np.max(np.abs(wide(values))) <= bound
            assert (
                np.max(np.abs(wide(values))) > 0.93 * bound
            )  # e4m3 has no closer one.


@each_api
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_weight_and_bias_are_uniform(parameters, dtype):
    bound = math.sqrt(1 / 20)
    with jax.enable_x64(dtype == "float64"):
        for values in parameters(20, 5000, param_dtype=dtype):
            values = wide(values).ravel()
            # Kolmogorov's 0.1 % point, and the width of one rounded value's bin.
            limit = 1.95 / math.sqrt(len(values)) + float(jnp.finfo(dtype).eps)
            assert kolmogorov_distance(values, bound) < limit
            assert abs(np.mean(values)) < 4 * bound / math.sqrt(3 * len(values))


@each_api
def test_weight_and_bias_are_drawn_from_different_keys(parameters):
    weight, bias = parameters(1, 1000)
    other_weight, _ = parameters(1, 1000, seed=1)
    assert abs(np.corrcoef(weight[:, 0], bias)[0, 1]) < 0.15
    assert abs(np.corrcoef(weight[:, 0], other_weight[:, 0])[0, 1]) < 0.15


@each_api
def test_complex_values_have_the_modulus_and_the_variance_of_real_ones(parameters):
    weight, bias = parameters(20, 5000, param_dtype="complex64")
    for values in (weight, bias):
        assert values.dtype == "complex64"
        assert np.max(np.abs(values)) <= math.sqrt(1 / 20)
    assert np.var(weight) == pytest.approx(1 / 60, rel=0.02)
    assert abs(np.corrcoef(weight.real.ravel(), weight.imag.ravel())[0, 1]) < 0.02


@each_api
def test_no_input_features_leave_an_empty_weight_and_a_zero_bias(parameters):
    weight, bias = parameters(0, 3)
    assert weight.shape == (3, 0)
    np.testing.assert_array_equal(bias, np.zeros(3))


@each_api
def test_a_device_is_where_the_parameters_are_created(parameters):
    device = jax.devices()[5]
    for values in parameters(8, 16, device=device):
        assert values.devices() == {device}


@each_api
@pytest.mark.parametrize(
    "spec",
    [("x",), ("x", None), (None, "x"), ()],
    ids=["row", "rows", "columns", "none"],
)
def test_a_sharding_is_how_the_parameters_are_created(parameters, spec):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    weight, bias = parameters(32, 64, device=sharding)
    assert weight.sharding.is_equivalent_to(sharding, 2)
    of_bias = NamedSharding(mesh, PartitionSpec(*spec[:1]))
    assert bias.sharding.is_equivalent_to(of_bias, 1)
    # The values do not depend on where they are created, but two programs may round.
    for placed, plain in zip((weight, bias), parameters(32, 64), strict=True):
        np.testing.assert_allclose(placed, plain, rtol=0, atol=3e-8)


def test_no_device_holds_more_than_its_shard_while_a_sharded_weight_is_created():
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x", None))

    @jax.jit
    def created(key):
        rngs = flax_nnx.Rngs(params=key)
        layer = nnx.Linear(1024, 4096, use_bias=False, device=sharding, rngs=rngs)
        return layer.weight[...]

    whole = 1024 * 4096 * 4
    memory = created.lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes == whole // 8
    # The draw's temporaries are a few arrays of the size of a shard.
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole * 5 / 8


IN, OUT = 50, 800
# The initializers of the porting guide, with the variance of a weight (out, in).
NAMED = {
    "kaiming": (initializers.he_normal, 2 / IN),
    "xavier": (initializers.glorot_uniform, 2 / (IN + OUT)),
    "lecun": (initializers.lecun_normal, 1 / IN),
    "scaled": (
        functools.partial(
            initializers.variance_scaling, 2.0, "fan_avg", "truncated_normal"
        ),
        4 / (IN + OUT),
    ),
    "pytorch": (
        functools.partial(initializers.variance_scaling, 1 / 3, "fan_in", "uniform"),
        1 / (3 * IN),
    ),
}


@pytest.mark.parametrize(("make", "variance"), NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stack"])
def test_initializers_by_name_have_the_fan_of_a_weight(make, variance, stack):
    batch = {"batch_axis": 0} if stack else {}
    init = make(in_axis=-1, out_axis=-2, **batch)
    weight = init(jax.random.key(0), (*stack, OUT, IN))
    # Of 40,000 draws: seven standard deviations.
    assert float(jnp.var(weight)) == pytest.approx(variance, rel=0.05)
