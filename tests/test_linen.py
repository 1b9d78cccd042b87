"""``jaxlinear.linen.Linear`` where ``flax.linen.Dense`` works, with the same values."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AxisType,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)
from oracle import naive, random_array

nn = pytest.importorskip("flax.linen")

from jaxlinear._flax.parameters import _device  # noqa: E402
from jaxlinear.linen import (  # noqa: E402
    Dense,
    DenseGeneral,
    Linear,
    convert_tree,
    layers_of,
    revert_tree,
)


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


MESH = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
PLACES = {
    "a device": jax.devices()[3],
    "a sharding of one device": SingleDeviceSharding(jax.devices()[3]),
    "a mesh": NamedSharding(MESH, PartitionSpec("model")),
}


@pytest.mark.parametrize("device", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", [Linear, Dense])
def test_copies_and_pickles_keep_the_device(kind, device):
    layer = nn.Sequential([kind(4, device=device)])
    expected = initialized(layer)["params"]["layers_0"]["weight"].sharding
    copies = copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for other in copies:
        assert other == layer
        weight = initialized(other)["params"]["layers_0"]["weight"]
        assert weight.sharding.is_equivalent_to(expected, 2)


def test_a_pickle_of_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"^`device` must be there, got cpu 99 of a p"):
        _device("cpu", 99)


# With the names of Flax's layers.


def network(dense, general):
    """Unnamed layers in blocks that are scanned, rematerialised, mapped and plain."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            heads = nn.relu(general((2, 4))(x))
            x = x + general(features=3, axis=(-2, -1))(heads)
            return dense(3)(nn.LayerNorm()(x)), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(nn.remat(Block), length=3, **lifted)()(x)
            x, _ = Block(name="named")(x)
            x = nn.vmap(dense, in_axes=None, axis_size=2, **lifted)(5)(x)
            return nn.remat(dense)(2, use_bias=False)(x)

    return Network()


def test_an_old_checkpoint_with_unnamed_layers_loads():
    flax, ours = network(nn.Dense, nn.DenseGeneral), network(Dense, DenseGeneral)
    with jax.numpy_rank_promotion("allow"):
        old, new = initialized(flax), initialized(ours)
        layers = layers_of(ours, jax.random.key(0), x())
        assert len(layers) == 8
        assert layers["ScanCheckpointBlock_0.DenseGeneral_1"] == (2, 1)
        loaded = convert_tree(old, layers)
        # The same seed also gives the same values.
        assert jax.tree.structure(loaded) == jax.tree.structure(new)
        for a, b in zip(*map(jax.tree.leaves, (loaded, new)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        y, expected = ours.apply(loaded, x()), flax.apply(old, x())
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, revert_tree(loaded, layers), old)


def test_the_arguments_of_dense_general_have_their_places():
    flax, ours = (
        nn.DenseGeneral(4, (-2, -1), (), False),
        DenseGeneral(4, (-2, -1), (), False),
    )
    inputs = x((5, 2, 3))
    shapes = (
        jax.tree.map(jnp.shape, initialized(layer, inputs)) for layer in (flax, ours)
    )
    assert [list(s["params"].values()) for s in shapes] == [[(2, 3, 4)], [(4, 2, 3)]]
    with pytest.raises(
        TypeError, match=r"^`use_bias` must be True or False, got \(-2,"
    ):
        Linear(4, (-2, -1))


@pytest.mark.parametrize("kind", [Linear, Dense, DenseGeneral])
def test_a_kernel_is_said_to_be_a_weight(kind):
    layer = kind(4)
    with pytest.raises(
        AttributeError, match=r"no attribute 'kernel': it has a `weight`"
    ):
        _ = layer.kernel
    assert not hasattr(layer, "kernel")
    with pytest.raises(AttributeError, match=r'has no attribute "kernels"'):
        _ = layer.kernels


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
