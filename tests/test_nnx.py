"""``jaxlinear.nnx.Linear`` where ``flax.nnx.Linear`` works, with the same values."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from oracle import naive, random_array, relative_error, wide

nnx = pytest.importorskip("flax.nnx")

from jaxlinear.nnx import Linear  # noqa: E402


def layer(in_features=3, out_features=4, **options):
    return Linear(in_features, out_features, rngs=nnx.Rngs(0), **options)


def flax_twin(ours, **options):
    """Flax's layer with the same parameters."""
    twin = nnx.Linear(ours.in_features, ours.out_features, rngs=nnx.Rngs(1), **options)
    twin.kernel.set_value(ours.weight[...].T)
    twin.bias.set_value(ours.bias[...])
    return twin


def squares(model, x):
    return jnp.sum(model(x).astype("float32") ** 2)


def x(shape=(5, 3), dtype="float32"):
    return random_array(7, shape, dtype)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_output_is_that_of_flax_with_the_same_parameters(leading, dtype):
    ours = layer(dtype=dtype)
    actual, expected = (
        ours(x((*leading, 3))),
        flax_twin(ours, dtype=dtype)(x((*leading, 3))),
    )
    assert actual.dtype == expected.dtype
    # Flax rounds the product, the bias and their sum: 3 roundings against one.
    tolerance = 2 * float(jnp.finfo(actual.dtype).eps)
    assert relative_error(actual, wide(expected)) < tolerance


def test_parameters_have_the_names_and_the_layout_of_pytorch():
    state = nnx.to_pure_dict(nnx.state(layer(3, 4), nnx.Param))
    assert jax.tree.map(jnp.shape, state) == {"weight": (4, 3), "bias": (4,)}


def test_without_a_bias_there_is_no_bias_parameter():
    ours = layer(use_bias=False)
    assert ours.bias is None
    assert list(nnx.to_pure_dict(nnx.state(ours, nnx.Param))) == ["weight"]
    np.testing.assert_array_equal(ours(x()), naive(x(), ours.weight[...]))


def test_parameters_and_gradients_have_the_param_dtype_and_the_output_the_dtype():
    ours = layer(dtype="bfloat16", param_dtype="float32")
    assert ours(x()).dtype == "bfloat16"
    for tree in (nnx.state(ours), nnx.grad(squares)(ours, x())):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


def test_split_merge_and_jit():
    ours = layer()
    expected = ours(x())
    graph, state = nnx.split(ours)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x()), expected)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(ours, x()), expected)


def test_layers_that_differ_in_their_initializers_have_the_same_graph():
    zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
    first = layer(kernel_init=zeros, bias_init=ones)
    second = layer(kernel_init=ones, bias_init=zeros)
    assert nnx.graphdef(first) == nnx.graphdef(second)


def test_abstract_creation_allocates_nothing():
    abstract = nnx.eval_shape(lambda: layer(1 << 20, 1 << 20))
    assert isinstance(abstract.weight.get_value(), jax.ShapeDtypeStruct)


def test_ensemble_made_by_vmap_is_applied_by_vmap_and_by_scan():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return Linear(3, 3, rngs=rngs)

    ensemble = make(nnx.Rngs(0))
    weight, bias = ensemble.weight[...], ensemble.bias[...]
    assert weight.shape == (2, 3, 3)
    assert not np.array_equal(weight[0], weight[1])

    each = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(ensemble, x())
    for i in range(2):
        expected = naive(x(), weight[i], bias[i])
        np.testing.assert_allclose(each[i], expected, rtol=1e-6)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def chain(x, model):
        return model(x)

    expected = naive(naive(x(), weight[0], bias[0]), weight[1], bias[1])
    np.testing.assert_allclose(chain(x(), ensemble), expected, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_compute_the_same():
    ours = layer()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        np.testing.assert_array_equal(other(x()), ours(x()))
        assert other.weight is not ours.weight


def test_orbax_saves_and_restores_the_parameters(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    ours, other = layer(), Linear(3, 4, rngs=nnx.Rngs(9))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(ours))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", nnx.state(other))
    nnx.update(other, restored)
    np.testing.assert_array_equal(other(x()), ours(x()))


def test_optax_trains_the_layer():
    optax = pytest.importorskip("optax")
    ours, target = layer(), random_array(8, (5, 4), "float32")
    optimizer = nnx.Optimizer(ours, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x()) - target) ** 2))(
            model
        )
        optimizer.update(model, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes dtypes.
        losses = [step(ours, optimizer) for _ in range(100)]
    # Five rows of four equations in four unknowns: least squares leaves a remainder.
    A, T = np.concatenate([x(), np.ones((5, 1))], axis=1), np.asarray(target)
    least = np.mean((A @ np.linalg.lstsq(A, T)[0] - T) ** 2)
    assert float(losses[-1]) == pytest.approx(least, rel=0.05)


def test_output_sharding_is_chosen_at_the_call_as_in_flax():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        ours, rows = layer(), jax.device_put(x((8, 3)), PartitionSpec("data", None))
        assert str(jax.typeof(ours(rows))) == "float32[8@data,4]"
        sharded = ours(rows, out_sharding=PartitionSpec("data", "model"))
        assert str(jax.typeof(sharded)) == "float32[8@data,4@model]"
