"""``jaxlinear.linen.Linear`` where ``flax.linen.Dense`` works, with the same values."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from oracle import naive, random_array

nn = pytest.importorskip("flax.linen")

from jaxlinear.linen import Linear  # noqa: E402


def x(shape=(5, 3), dtype="float32"):
    return random_array(7, shape, dtype)


def initialized(layer, inputs=None):
    return layer.init(jax.random.key(0), x() if inputs is None else inputs)


def squares(layer):
    return lambda variables, x: jnp.sum(
        layer.apply(variables, x).astype("float32") ** 2
    )


def test_in_features_are_read_from_the_input():
    shapes = jax.tree.map(jnp.shape, initialized(Linear(4), x((2, 7))))
    assert shapes == {"params": {"weight": (4, 7), "bias": (4,)}}


def test_without_a_bias_there_is_no_bias_parameter():
    layer = Linear(4, use_bias=False)
    variables = initialized(layer)
    assert list(variables["params"]) == ["weight"]
    expected = naive(x(), variables["params"]["weight"])
    np.testing.assert_array_equal(layer.apply(variables, x()), expected)


def test_parameters_and_gradients_have_the_param_dtype_and_the_output_the_dtype():
    layer = Linear(4, dtype="bfloat16", param_dtype="float32")
    variables = initialized(layer)
    assert layer.apply(variables, x()).dtype == "bfloat16"
    for tree in (variables, jax.grad(squares(layer))(variables, x())):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


def test_layer_is_used_inside_other_modules_and_under_linen_transformations():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                lambda layer, x, _: (nn.tanh(layer(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = scanned(Linear(3, name="hidden"), x, None)
            return nn.remat(Linear)(2, name="head")(x)

    variables = initialized(Stack())
    weights, biases = (variables["params"]["hidden"][n] for n in ("weight", "bias"))
    expected = x()
    for weight, bias in zip(weights, biases, strict=True):
        expected = jnp.tanh(naive(expected, weight, bias))
    expected = naive(expected, **variables["params"]["head"])
    np.testing.assert_allclose(
        jax.jit(Stack().apply)(variables, x()), expected, rtol=1e-5, atol=1e-6
    )


def test_abstract_initialization_allocates_nothing():
    wide_input = jax.ShapeDtypeStruct((1, 1 << 20), "float32")
    abstract = jax.eval_shape(Linear(1 << 20).init, jax.random.key(0), wide_input)
    assert abstract["params"]["weight"].shape == (1 << 20, 1 << 20)


def test_partitioned_initializers_name_the_axes_as_flax_does():
    partitioned = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    layer = Linear(4, kernel_init=partitioned)
    specs = nn.get_partition_spec(initialized(layer))
    assert specs["params"]["weight"] == PartitionSpec("model", None)

    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    shardings = nn.get_sharding(jax.eval_shape(lambda: initialized(layer)), mesh)
    variables = jax.jit(lambda: initialized(layer), out_shardings=shardings)()
    assert variables["params"]["weight"].value.sharding.spec == PartitionSpec(
        "model", None
    )
    expected = naive(
        x(), *(nn.unbox(variables)["params"][n] for n in ("weight", "bias"))
    )
    np.testing.assert_allclose(layer.apply(variables, x()), expected, rtol=1e-6)


def test_copies_and_pickles_compute_the_same():
    layer = Linear(4)
    variables = initialized(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other == layer
        np.testing.assert_array_equal(
            other.apply(variables, x()), layer.apply(variables, x())
        )


def test_orbax_saves_and_restores_the_parameters(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    variables = initialized(Linear(4))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", variables)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


def test_another_number_of_features_than_the_initialized_one_is_refused_by_name():
    variables = initialized(Linear(4))
    message = r"^`x` must have 3 elements along its last axis.*got shape \(5, 2\)"
    with pytest.raises(ValueError, match=message):
        Linear(4).apply(variables, x((5, 2)))
