"""A Flax model with nothing changed but the import of its linear layer.

Each model is written once, as in Flax's examples lm1b (Linen) and gemma (NNX), with
partitioned kernels. The oracle is the same model with Flax's layer.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random_array, relative_error, wide

import jaxlinear.linen
import jaxlinear.nnx

EMBED, MLP, HEADS, LENGTH, VOCABULARY = 16, 32, 2, 5, 24
EPS = float(jnp.finfo("float32").eps)
LAYERS = {"linen": (jaxlinear.linen.Linear, nn.Dense)}
LAYERS |= {"nnx": (jaxlinear.nnx.Linear, nnx.Linear)}


# The start of a model, as README says it.


def flax_start():
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    [arguments] = re.findall(r"`(kernel_init=[^`]*)`", text)
    return eval(f"dict({arguments})", {"nnx": nnx})


def first_loss_of_nnx(layer, x):
    rngs = nnx.Rngs(7)
    model = nnx.Sequential(layer(12, 32, rngs=rngs), nnx.relu, layer(32, 4, rngs=rngs))
    return jnp.mean(model(x) ** 2)


def first_loss_of_linen(layer, x):
    model = nn.Sequential([layer(32, name="up"), nn.relu, layer(4, name="down")])
    return jnp.mean(model.init_with_output(jax.random.key(7), x)[0] ** 2)


@pytest.mark.parametrize("api", LAYERS)
def test_the_arguments_of_readme_give_the_start_of_flax(api):
    first_loss = {"nnx": first_loss_of_nnx, "linen": first_loss_of_linen}[api]
    x = random_array(0, (64, 12), "float32")
    ours, flax = LAYERS[api]
    expected = first_loss(flax, x)
    actual = first_loss(functools.partial(ours, **flax_start()), x)
    np.testing.assert_allclose(actual, expected, rtol=8 * EPS)
    # PyTorch's start is another: that is what README warns of.
    assert abs(first_loss(ours, x) / expected - 1) > 0.1


# lm1b: logical names, initializers in boxes, a dtype.


class LinenBlock(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        def dense(features, names, name):
            return self.dense(
                features,
                dtype=jnp.float32,
                use_bias=True,
                kernel_init=nn.with_logical_partitioning(
                    nn.initializers.xavier_uniform(), names
                ),
                bias_init=nn.with_logical_partitioning(
                    nn.initializers.normal(stddev=1e-2), names[1:]
                ),
                name=name,
            )

        normed = nn.LayerNorm()(x)
        q, k, v = (
            dense(EMBED, ("embed", "heads"), name)(normed).reshape(
                *x.shape[:-1], HEADS, -1
            )
            for name in ("query", "key", "value")
        )
        attended = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(EMBED, ("heads", "embed"), "out")(attended)
        h = nn.relu(dense(MLP, ("embed", "mlp"), "up")(nn.LayerNorm()(x)))
        return x + dense(EMBED, ("mlp", "embed"), "down")(h)


class LinenModel(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, EMBED)(tokens)
        x = LinenBlock(self.dense)(x)
        return self.dense(VOCABULARY, name="logits")(nn.LayerNorm()(x))


# gemma: no biases, a partitioned initializer here and metadata there.


class NNXBlock(nnx.Module):
    def __init__(self, linear, rngs):
        normal = nnx.initializers.normal()
        partitioned = {"kernel_init": nnx.with_partitioning(normal, (None, "model"))}
        named = {
            "kernel_init": normal,
            "kernel_metadata": {"out_sharding": ("model", None)},
        }
        self.norm = nnx.RMSNorm(EMBED, rngs=rngs)
        options = {"use_bias": False, "rngs": rngs}
        self.gate = linear(EMBED, MLP, **partitioned, **options)
        self.up = linear(EMBED, MLP, **partitioned, **options)
        self.down = linear(MLP, EMBED, **named, **options)

    def __call__(self, x):
        h = self.norm(x)
        return x + self.down(nnx.gelu(self.gate(h)) * self.up(h))


class NNXModel(nnx.Module):
    def __init__(self, linear, rngs):
        self.blocks = nnx.List([NNXBlock(linear, rngs) for _ in range(2)])
        self.head = linear(
            in_features=EMBED,
            out_features=VOCABULARY,
            bias_init=nnx.initializers.normal(),
            bias_metadata={"out_sharding": ("model",)},
            kernel_init=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def as_flax_has_them(parameters):
    """Our parameters, by path, with Flax's names and layout."""
    renamed = {}
    for path, value in flatten_dict(parameters).items():
        *parents, name = path
        is_weight = name == "weight"
        renamed[*parents, "kernel" if is_weight else name] = (
            value.T if is_weight else value
        )
    return renamed


def assert_equal(ours, flax):
    ours, flax = as_flax_has_them(ours), flatten_dict(flax)
    assert ours.keys() == flax.keys()
    for path, value in flax.items():
        np.testing.assert_array_equal(ours[path], value)


def assert_close(ours, flax):
    """But for rounded sums of up to 32 terms, a dozen in a row.

    The gradient of the bias of the keys is zero, but for what is left of larger ones.
    """
    ours, flax = as_flax_has_them(ours), flatten_dict(flax)
    largest = max(np.linalg.norm(value) for value in flax.values())
    for path, value in flax.items():
        scale = max(np.linalg.norm(value), largest / 100)
        assert np.linalg.norm(ours[path] - value) < 64 * EPS * scale, path


def assert_specs_swapped(ours, flax):
    """Those of a weight are those of its kernel, the other way around."""
    ours, flax = flatten_dict(ours), flatten_dict(flax)
    for path, spec in flax.items():
        *parents, name = path
        if name == "kernel" and spec:
            assert ours[*parents, "weight"] == P(*reversed(spec)), path
        elif name != "kernel":
            assert ours[path] == spec, path


def test_a_linen_model_has_the_same_parameters_results_and_names():
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
    boxed, parameters, gradients, outputs = [], [], [], []
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for dense in LAYERS["linen"]:
            model = LinenModel(dense)
            variables = model.init(jax.random.key(0), tokens)
            logits = variables["params"]["logits"]
            # Without an initializer ours are PyTorch's.
            head = random_array(1, (EMBED, VOCABULARY), "float32")
            if "weight" in logits:
                logits |= {"weight": head.T, "bias": jnp.zeros(VOCABULARY)}
            else:
                logits |= {"kernel": head}
            boxed.append(variables["params"])
            unboxed = nn.unbox(variables)["params"]
            parameters.append(unboxed)

            def loss(p, model=model):
                return jnp.sum(model.apply({"params": p}, tokens) ** 2)

            outputs.append(model.apply({"params": unboxed}, tokens))
            gradients.append(jax.grad(loss)(unboxed))
    assert_equal(*parameters)
    assert relative_error(outputs[0], wide(outputs[1])) < 64 * EPS
    assert_close(*gradients)
    assert_specs_swapped(*map(nn.get_partition_spec, boxed))


def nnx_parameters(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_an_nnx_model_has_the_same_parameters_results_and_names():
    x = random_array(0, (2, LENGTH, EMBED), "float32")
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        models = [NNXModel(linear, nnx.Rngs(0)) for linear in LAYERS["nnx"]]
        assert_equal(*map(nnx_parameters, models))
        outputs = [model(x) for model in models]
        assert relative_error(outputs[0], wide(outputs[1])) < 64 * EPS
        gradients = [
            nnx.to_pure_dict(nnx.grad(lambda m: jnp.sum(m(x) ** 2))(m)) for m in models
        ]
        assert_close(*gradients)
        specs = [nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(m))) for m in models]
        assert_specs_swapped(*specs)
        # The shards lie where the names say.
        down, gate = models[0].blocks[0].down.weight, models[0].blocks[0].gate.weight
        assert down[...].sharding.is_equivalent_to(
            NamedSharding(mesh, P(None, "model")), 2
        )
        assert gate[...].sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 2)


INITIALIZERS = ["he_normal", "lecun_normal", "glorot_uniform", "orthogonal"]


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers_see_the_kernel_and_so_the_right_fan(name):
    init = getattr(jax.nn.initializers, name)()
    ours, flax = (
        layer(512, 8, kernel_init=init, rngs=nnx.Rngs(0)) for layer in LAYERS["nnx"]
    )
    np.testing.assert_array_equal(ours.weight[...].T, flax.kernel[...])
    x = jnp.zeros(512)
    ours, flax = (
        layer(8, kernel_init=init).init(jax.random.key(0), x)["params"]
        for layer in LAYERS["linen"]
    )
    np.testing.assert_array_equal(ours["weight"].T, flax["kernel"])


def test_he_normal_has_the_deviation_of_512_inputs():
    init = jax.nn.initializers.he_normal()
    layer = jaxlinear.nnx.Linear(512, 8, kernel_init=init, rngs=nnx.Rngs(0))
    assert float(jnp.std(layer.weight[...])) == pytest.approx(
        (2 / 512) ** 0.5, rel=0.05
    )


SHARDINGS = {
    "names": (("model", "data"), ("data", "model")),
    "one name": (("model",), (None, "model")),
    "spec": (P(None, "model"), P("model", None)),
    "two axes": (P(("model", "data")), P(None, ("model", "data"))),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
def test_each_way_to_name_axes_names_those_of_the_kernel(sharding, axis_type):
    given, kept = sharding
    mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=(axis_type,) * 2)
    init = nnx.initializers.normal()
    named = {"kernel_init": init, "kernel_metadata": {"out_sharding": given}}
    boxed = {"kernel_init": nnx.with_partitioning(init, given)}
    with jax.set_mesh(mesh):
        assert_sharded(NamedSharding(mesh, P(*kept)), **named)
        assert_sharded(NamedSharding(mesh, P(*kept)), **boxed)


def test_a_named_sharding_is_one_of_the_kernel():
    mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    given, kept = (
        NamedSharding(mesh, P(*axes)) for axes in (("model",), (None, "model"))
    )
    init = nnx.initializers.normal()
    assert_sharded(kept, kernel_init=init, kernel_metadata={"out_sharding": given})


def assert_sharded(expected, **options):
    weight = jaxlinear.nnx.Linear(8, 16, rngs=nnx.Rngs(0), **options).weight
    assert weight[...].sharding.is_equivalent_to(expected, 2)
    init = nnx.initializers.normal()
    plain = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(weight[...].T, plain.kernel[...])


def test_a_stack_of_layers_names_the_axis_of_the_stack():
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    specs, shapes = [], []
    for dense in LAYERS["linen"]:
        stacked = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

        class Stack(nn.Module):
            dense: type[nn.Module]
            stacked: object

            @nn.compact
            def __call__(self, x):
                layer = self.dense(4, kernel_init=init, name="layer")
                return self.stacked(layer, x, None)[0]

        variables = Stack(dense, stacked).init(jax.random.key(0), jnp.ones((2, 4)))
        (parameters,) = variables["params"].values()
        name = "weight" if "weight" in parameters else "kernel"
        specs.append(nn.get_partition_spec(parameters)[name])
        shapes.append(nn.unbox(parameters)[name].shape)
    assert specs == [P("layers", "mlp", "embed"), P("layers", "embed", "mlp")]
    assert shapes == [(3, 4, 4)] * 2


def test_a_device_shards_the_weight_that_a_kernel_initializer_draws():
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), P("x", None))
    init = nnx.initializers.he_normal()
    for device in (sharding, jax.devices()[3]):
        options = {"kernel_init": init, "rngs": nnx.Rngs(0), "device": device}
        weight = jaxlinear.nnx.Linear(4, 16, **options).weight[...]
        shard = (2, 4) if device is sharding else (16, 4)
        assert weight.addressable_shards[0].data.shape == shard
        plain = nnx.Linear(4, 16, kernel_init=init, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(weight.T, plain.kernel[...])


# What looks for a parameter called `kernel`, told of `weight`.


def test_linen_weight_norm_finds_the_weight_that_it_is_told_of():
    x = random_array(0, (5, 3), "float32")
    ours, flax = (layer(4) for layer in LAYERS["linen"])
    told = {"feature_axes": 0, "variable_filter": {"weight"}}
    weight, bias = (random_array(1, shape, "float32") for shape in ((4, 3), (4,)))
    scale = random_array(2, (4,), "float32")

    def applied(layer, name, weight):
        parameters = {"layer_instance": {name: weight, "bias": bias}}
        parameters[f"layer_instance/{name}/scale"] = scale
        return layer.apply({"params": parameters}, x)

    with jax.numpy_rank_promotion("allow"):
        actual = applied(nn.WeightNorm(ours, **told), "weight", weight)
        expected = applied(nn.WeightNorm(flax), "kernel", weight.T)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    plain = ours.apply({"params": {"weight": weight, "bias": bias}}, x)
    assert np.max(np.abs(actual - plain)) > 0.1


def test_nnx_weight_norm_finds_the_weight_that_it_is_told_of():
    x = random_array(0, (5, 3), "float32")
    ours, flax = (layer(3, 4, rngs=nnx.Rngs(0)) for layer in LAYERS["nnx"])
    flax.kernel[...], flax.bias[...] = ours.weight[...].T, ours.bias[...]
    plain = ours(x)
    told = {"feature_axes": 0, "variable_filter": nnx.PathContains("weight")}
    with jax.numpy_rank_promotion("allow"):
        expected = nnx.WeightNorm(flax, rngs=nnx.Rngs(1))(x)
        actual = nnx.WeightNorm(ours, rngs=nnx.Rngs(1), **told)(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(actual - plain)) > 0.1


def test_a_kernel_is_said_to_be_a_weight_when_it_is_read_and_when_it_is_set():
    layer = jaxlinear.nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    message = (
        r"^'Linear' object has no attribute 'kernel': it has a `weight` \(out, in\)"
    )
    with pytest.raises(AttributeError, match=message):
        _ = layer.kernel
    with pytest.raises(AttributeError, match=message):
        layer.kernel = nnx.Param(jnp.ones((3, 4)))
    assert not hasattr(layer, "kernel")
    with pytest.raises(AttributeError, match=r"^'Linear' object has no attribute 'b'$"):
        _ = layer.b
    # A state of Flax's would be kept, and not be read.
    state = nnx.state(nnx.Dict(layer=nnx.Linear(3, 4, rngs=nnx.Rngs(1))))
    with pytest.raises(AttributeError, match=message):
        nnx.update(nnx.Dict(layer=layer), state)


def test_a_subclass_may_have_a_kernel_of_its_own():
    class Own(jaxlinear.nnx.Linear):
        @property
        def kernel(self):
            return self.weight[...].T

        @kernel.setter
        def kernel(self, value):
            self.weight[...] = value.T

    layer = Own(3, 4, rngs=nnx.Rngs(0))
    layer.kernel = jnp.ones((3, 4))
    np.testing.assert_array_equal(layer.kernel, jnp.ones((3, 4)))


def test_a_mask_of_an_optimizer_finds_the_weights_by_their_name():
    parameters = nnx_parameters(jaxlinear.nnx.Linear(3, 4, rngs=nnx.Rngs(0)))

    def decayed(parameters):
        return {name: name == "weight" for name in parameters}

    optimizer = optax.adamw(1.0, weight_decay=0.5, mask=decayed)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zero, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["weight"], -0.5 * parameters["weight"])
    np.testing.assert_array_equal(updates["bias"], 0)


# Flax's arguments that have no place here.

REFUSED = {
    "dot_general": (jax.lax.dot_general, "`products` says how each product is"),
    "promote_dtype": (lambda *a, **k: a, "`dtype` and `products` say to what"),
    "preferred_element_type": ("float32", "say it of a product"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_here_is_refused_with_what_takes_its_place(name):
    value, message = REFUSED[name]
    jaxlinear.nnx.Linear(3, 4, rngs=nnx.Rngs(0), **{name: None})  # Asks for nothing.
    options = {name: value}
    message = f"^unexpected argument `{name}`: {message}"
    with pytest.raises(TypeError, match=message):
        jaxlinear.nnx.Linear(3, 4, rngs=nnx.Rngs(0), **options)
    if name != "preferred_element_type":  # No argument of Flax's Linen layer.
        with pytest.raises(TypeError, match=message):
            jaxlinear.linen.Linear(4, **options)
