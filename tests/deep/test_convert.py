"""Models of Flax with our layer in the place of theirs, and the way back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import random_array, relative_error, wide

import jaxlinear.linen
from jaxlinear import INT8, Product, Products
from jaxlinear.nnx import (
    Linear,
    convert,
    convert_tree,
    dimension_numbers,
    layers_of,
    revert,
    revert_tree,
)

EPS = float(jnp.finfo("float32").eps)
WIDTH, VOCABULARY = 16, 11
IDS = jnp.arange(20).reshape(2, 10) % VOCABULARY


@pytest.fixture(autouse=True)
def _ordinary_promotion():
    """Flax's own layers promote dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Block(nnx.Module):
    def __init__(self, rngs, dtype):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, WIDTH, decode=False, dtype=dtype, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(IDS))
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    """Attention, MLPs, a tied embedding, a shared block, and LoRA on top."""

    def __init__(self, rngs, dtype=None):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, dtype) for _ in range(2)])
        self.blocks.append(self.blocks[0])
        self.adapted = nnx.LoRA(
            WIDTH,
            2,
            WIDTH,
            base_module=nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs),
            rngs=rngs,
        )

    def __call__(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.adapted(x))


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@nnx.jit
def step(model, optimizer):
    def loss(model):
        # As a new model of Flax's has large logits.
        logits = model(IDS).astype("float32") / 8
        each = optax.softmax_cross_entropy_with_integer_labels(logits, IDS)
        return each.mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


# float32: a few times eps of the logits; bfloat16: the roundings of ten layers.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(None, 1e-5), (jnp.bfloat16, 3e-2)],
    ids=["float32", "mixed"],
)
def test_a_converted_model_trains_as_the_model_of_flax(dtype, tolerance):
    flax = Decoder(nnx.Rngs(0), dtype)
    theirs = nnx.Optimizer(flax, optax.adamw(1e-3), wrt=nnx.Param)
    step(flax, theirs)  # The optimizer has a state.
    model, optimizer = nnx.clone((flax, theirs))
    before = parameters(model)
    report = convert(model, optimizer)
    projections = [f"attention.{name}" for name in ("key", "out", "query", "value")]
    assert list(report.converted) == [
        f"blocks.{i}.{name}" for i in range(2) for name in [*projections, "down", "up"]
    ]
    assert report.left_alone == {"adapted.base_module": "it is inside LoRA"}
    assert model.blocks[2] is model.blocks[0]
    assert isinstance(model.blocks[1].attention.out, Linear)
    for _ in range(2):
        expected = step(flax, theirs)
        assert abs(step(model, optimizer) - expected) <= tolerance * expected
    trained = nnx.state(model)
    reverted = revert(model, optimizer)
    assert (reverted.left_alone, reverted.lost) == ({}, {})
    assert nnx.split(model)[0] == nnx.split(flax)[0]
    states = (jax.tree.structure(nnx.state(o)) for o in (optimizer, theirs))
    assert len(set(states)) == 1
    # The tree's own way gives the same.
    for tree, expected in (
        (revert_tree(trained, report.converted), nnx.state(model)),
        (convert_tree(nnx.state(model), report.converted), trained),
    ):
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert parameters(model).keys() == before.keys()
    for _ in range(2):
        expected = step(flax, theirs)
        assert abs(step(model, optimizer) - expected) <= tolerance * expected


def test_conversion_and_reversion_change_no_bit():
    model = Decoder(nnx.Rngs(0))
    before = parameters(model)
    after = (convert(model), parameters(model), revert(model), parameters(model))[1::2]
    query = before["blocks.0.attention.query.kernel"]
    np.testing.assert_array_equal(
        after[0]["blocks.0.attention.query.weight"], query.transpose(1, 2, 0)
    )
    jax.tree.map(np.testing.assert_array_equal, after[1], before)


class Holder(nnx.Module):
    def __init__(self, **layers):
        for name, layer in layers.items():
            setattr(self, name, nnx.data(layer))


def flax(**options):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0), **options)


class Own(nnx.Linear):
    pass


def other_product(*operands, **options):
    return jax.lax.dot_general(*operands, **options)


def other_promotion(arrays, dtype):
    return arrays


def test_what_has_its_own_way_to_a_product_is_left_alone_and_reported():
    marked = flax()
    marked.mask = nnx.Param(jnp.ones((4, 4)))
    tied = flax()
    model = Holder(
        subclass=Own(4, 4, rngs=nnx.Rngs(0)),
        lora=nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0)),
        adapted=nnx.LoRA(4, 2, 4, base_module=flax(), rngs=nnx.Rngs(0)),
        normed=nnx.WeightNorm(flax(), rngs=nnx.Rngs(0)),
        spectral=nnx.SpectralNorm(flax(), rngs=nnx.Rngs(0)),
        product=flax(dot_general=other_product),
        promotion=flax(promote_dtype=other_promotion),
        general=nnx.LinearGeneral(
            4, 4, batch_axis={0: 2}, dot_general=None, rngs=nnx.Rngs(0)
        ),
        custom=nnx.LinearGeneral(4, 4, dot_general_cls=lambda: None, rngs=nnx.Rngs(0)),
        einsum=nnx.Einsum("ab,bc->ac", (4, 4), rngs=nnx.Rngs(0)),
        marked=marked,
        narrow=flax(dtype=jnp.float32, preferred_element_type=jnp.bfloat16),
        whole=flax(param_dtype=jnp.int8, kernel_init=nnx.initializers.zeros),
        undecided=flax(preferred_element_type=jnp.bfloat16),
        unscaled=flax(dtype=jnp.float8_e4m3fn),
        tied=tied,
        reader=[tied.kernel],
        converted=flax(),
    )
    report = convert(model)
    assert report.left_alone == {
        "adapted.base_module": "it is inside LoRA",
        "custom": "it has a dot_general_cls",
        "einsum": "it is an Einsum",
        "general": "it has a batch_axis",
        "lora": "LoRALinear is a subclass",
        "marked": "it has an attribute of its own: mask",
        "narrow": "its preferred_element_type is not wider than its dtype",
        "normed.layer_instance": "it is inside WeightNorm",
        "product": "it has a dot_general",
        "promotion": "it has a promote_dtype",
        "spectral.layer_instance": "it is inside SpectralNorm",
        "subclass": "Own is a subclass",
        "tied": "its kernel is also reader.0",
        "whole": "its param_dtype is not a floating dtype",
        "undecided": "it has a preferred_element_type and no dtype",
        "unscaled": "its dtype has fewer than 16 bits, and no scale",
    }
    assert list(report.converted) == ["converted"]
    assert str(report).splitlines()[:3] == [
        "converted (1):",
        "  converted",
        "left alone (16):",
    ]


def test_every_place_that_holds_a_layer_gets_the_new_one():
    shared = flax()
    model = Holder(
        plain=shared,
        sequence=nnx.Sequential(shared, nnx.relu),
        listed=[shared, {"inner": shared}],
        pair=(shared, 1),
        mapping=nnx.Dict(a=shared),
    )
    model.itself = model
    report = convert(model)
    new = model.plain
    assert isinstance(new, Linear)
    held = model.sequence.layers[0], model.listed[0], model.listed[1]["inner"]
    assert all(layer is new for layer in (*held, model.pair[0], model.mapping.a))
    assert len(report.converted) == 1


def test_layers_that_share_a_kernel_share_a_weight():
    first, second = flax(), flax()
    second.kernel = first.kernel
    model = Holder(first=first, second=second)
    convert(model)
    assert model.first.weight is model.second.weight
    assert model.first.bias is first.bias


def test_stacked_layers_are_converted_as_a_stack():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Linear(4, 6, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def heads(rngs):
        return nnx.LinearGeneral(4, (2, 3), rngs=rngs)

    model = Holder(stack=stack(nnx.Rngs(0)), heads=heads(nnx.Rngs(0)))
    kernels = model.stack.kernel[...], model.heads.kernel[...]
    report = convert(model)
    np.testing.assert_array_equal(model.stack.weight[...], kernels[0].swapaxes(1, 2))
    expected = kernels[1].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(model.heads.weight[...], expected)
    x = random_array(1, (3, 5, 4), "float32")
    y = nnx.vmap(lambda layer, x: layer(x))(model.heads, x)
    exact = np.einsum("lni,liab->lnab", wide(x), wide(kernels[1]))
    assert relative_error(y, exact) <= 8 * EPS
    tree = revert_tree(nnx.state(model), report.converted)
    np.testing.assert_array_equal(tree["heads"]["kernel"][...], kernels[1])


def test_options_keep_their_meaning():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32, "use_bias": False}
    wider = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    model = Holder(
        options=flax(precision="highest", **options),
        wider=flax(**wider),
        same=flax(dtype=jnp.float32, preferred_element_type=jnp.float32),
    )
    x = random_array(1, (64, 4), "float32")
    expected = {name: getattr(model, name)(x) for name in ("options", "wider", "same")}
    convert(model)
    precision = model.options.precision
    assert (precision, model.options.bias) == (jax.lax.Precision.HIGHEST, None)
    for name, y in expected.items():
        mine = getattr(model, name)(x)
        assert mine.dtype == y.dtype
        # One rounding to the dtype of the output, and one of the bias.
        eps = float(jnp.finfo(y.dtype).eps)
        assert relative_error(mine, wide(y)) <= 2 * eps
    report = revert(model)
    assert report.lost == {}
    assert model.wider.dtype == jnp.bfloat16
    assert model.wider.preferred_element_type == jnp.float32


def test_a_kernel_keeps_its_kind_its_metadata_and_its_sharding():
    class Frozen(nnx.Variable):
        pass

    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    names = {"out_sharding": ("a", "b"), "note": "mine"}
    with jax.set_mesh(mesh):
        model = Holder(layer=nnx.Linear(8, 16, kernel_metadata=names, rngs=nnx.Rngs(0)))
        kernel = model.layer.kernel
        model.layer.kernel = Frozen(kernel[...], **names)
        optimizer = nnx.Optimizer(model, optax.sgd(1, 0.9), wrt=Frozen)
        convert(model, optimizer)
    weight, trace = model.layer.weight, optimizer.opt_state[0].trace["layer"]["weight"]
    assert type(weight) is Frozen
    for variable in weight, trace:
        assert variable.get_metadata("out_sharding") == ("b", "a")
        assert variable.get_metadata("note") == "mine"
        assert variable.shape == (16, 8)
    sharding = NamedSharding(mesh, P("b", "a"))
    assert weight[...].sharding.is_equivalent_to(sharding, 2)
    revert(model)
    assert model.layer.kernel.get_metadata("out_sharding") == ("a", "b")


def test_products_that_flax_cannot_have_are_reported_as_lost():
    model = Holder(
        eight=Linear(4, 4, products=INT8, rngs=nnx.Rngs(0)),
        highest=Linear(
            4, 4, products=Products(Product(precision="highest")), rngs=nnx.Rngs(0)
        ),
        plain=Linear(4, 4, precision="highest", rngs=nnx.Rngs(0)),
    )
    report = revert(model)
    assert report.lost == {"eight": "products", "highest": "products"}
    assert model.plain.precision == jax.lax.Precision.HIGHEST
    assert type(model.eight) is nnx.Linear


# Trees without a model.


def test_a_tree_is_converted_where_the_layer_is_and_nowhere_else():
    kernel = jnp.arange(6.0).reshape(2, 3)
    tree = {
        "params": {
            "up": {"kernel": kernel, "bias": jnp.ones(3)},
            "other": {"up": {"kernel": kernel}},
            "kernel": {"up": {"kernel": kernel}},
        }
    }
    converted = convert_tree(tree, ["up"])["params"]
    np.testing.assert_array_equal(converted["up"]["weight"], kernel.T)
    assert converted["up"].keys() == {"bias", "weight"}
    assert converted["other"]["up"].keys() == {"kernel"}
    assert converted["kernel"]["up"].keys() == {"kernel"}
    assert tree["params"]["up"].keys() == {"bias", "kernel"}


def test_an_optimizer_of_plain_trees_goes_on_as_before():
    tree = {
        "a": {"up": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
        "up": {"scale": jnp.ones(3)},
    }
    optimizer = optax.chain(
        optax.masked(optax.trace(0.5), {"a": True, "up": False}), optax.adam(0.1)
    )
    state = optimizer.init(tree)
    gradients = jax.tree.map(lambda p: p + 1, tree)
    _, state = optimizer.update(gradients, state, tree)
    expected, _ = optimizer.update(gradients, state, tree)

    def ours(tree):
        return jaxlinear.linen.convert_tree(tree, ["a.up"])

    updates, after = optimizer.update(ours(gradients), ours(state), ours(tree))
    jax.tree.map(np.testing.assert_array_equal, updates, ours(expected))
    assert jax.tree.structure(revert_tree(after, ["a.up"])) == jax.tree.structure(state)


def test_abstract_arrays_and_boxes_are_moved_with_their_names():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a", "b"))
    abstract = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding)
    boxed = nn.Partitioned(jnp.ones((3, 4, 8)), names=("layers", "a", "b"))
    tree = {
        "x": {"kernel": abstract},
        "y": {"kernel": boxed},
        "z": {"kernel": np.ones((4, 8))},
    }
    converted = convert_tree(tree, ["x", "y", "z"])
    assert converted["x"]["weight"].shape == (8, 4)
    assert converted["x"]["weight"].sharding.spec == P("b", "a")
    assert converted["y"]["weight"].names == ("layers", "b", "a")
    assert converted["y"]["weight"].value.shape == (3, 8, 4)
    assert isinstance(converted["z"]["weight"], np.ndarray)
    assert revert_tree(converted, ["x", "y", "z"])["x"] == tree["x"]


def test_a_checkpoint_of_orbax_restores_into_the_other_model(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")

    def saved(model, name):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, nnx.to_pure_dict(nnx.state(model)))

    def restored(name, abstract):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / name, abstract)

    model = Holder(
        body=nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), head=flax()
    )
    before = parameters(model)
    saved(model, "flax")
    report = convert(model)
    saved(model, "ours")
    after = parameters(model)

    # One from before, into the converted model: restored as Flax has it, and converted.
    state = nnx.to_pure_dict(nnx.state(model))
    abstract = jax.tree.map(
        ocp.utils.to_shape_dtype_struct, revert_tree(state, report.converted)
    )
    tree = convert_tree(restored("flax", abstract), report.converted)
    jax.tree.map(np.testing.assert_array_equal, tree, state)
    nnx.update(model, tree)
    jax.tree.map(np.testing.assert_array_equal, parameters(model), after)
    # One from after, and one from before once the model is Flax's again.
    restored("ours", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    revert(model)
    abstract = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(model)))
    nnx.update(model, restored("flax", abstract))
    jax.tree.map(np.testing.assert_array_equal, parameters(model), before)


REFUSED = {
    "a layer": (
        TypeError,
        lambda: convert(flax()),
        r"^`model` must be what holds the layers, got .* a Linear: put it into an",
    ),
    "no module": (
        TypeError,
        lambda: convert({}),
        r"^`model` must be a flax.nnx.Module, got dict$",
    ),
    "no optimizer": (
        TypeError,
        lambda: convert(nnx.Sequential(flax()), optax.sgd(1)),
        r"^`optimizer` must be a flax.nnx.Optimizer, got GradientTransformation",
    ),
    "a layer that is not there": (
        ValueError,
        lambda: convert_tree({"up": {"kernel": jnp.ones((2, 3))}}, ["up", "down"]),
        r"^`layers` must have an entry 'kernel' in `tree`, .* none for 'down'$",
    ),
    "one string": (
        TypeError,
        lambda: convert_tree({}, "up"),
        r"^`layers` must be paths of layers, got one string: pass \['up'\]$",
    ),
    "no count of axes": (
        TypeError,
        lambda: convert_tree({}, {"up": 3}),
        r"^`layers` must say how many .* axes 'up' has, such as \(1, 1\), got 3$",
    ),
    "a factored state": (
        ValueError,
        lambda: convert_tree({"up": {"kernel": jnp.ones(3)}}, ["up"]),
        r"^`tree` must have 2 axes or more at 'up.kernel', got shape \(3,\): st",
    ),
}


@pytest.mark.parametrize(("kind", "call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(kind, call, message):
    with pytest.raises(kind, match=message):
        call()


# Optimizers that leave parameters out, or do not keep an array for each parameter.
# `tests/deep/test_optimizers.py` has all of Optax's.


def small(width=4, seed=0):
    first = nnx.Linear(width, 6, rngs=nnx.Rngs(seed))
    return nnx.Dict(first=first, last=nnx.Linear(6, 3, rngs=nnx.Rngs(seed + 1)))


def is_named(*names):
    """A function of parameters: whether one has one of the names in its path."""

    def of(path, _):
        entries = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return bool({*names} & {*entries})

    return lambda parameters: jax.tree.map_with_path(of, parameters)


def frozen_but_last(parameters):
    return jax.tree.map(lambda last: "t" if last else "f", is_named("last")(parameters))


kernels = is_named("kernel", "weight")
numbers = dimension_numbers(["first", "last"], optax.contrib.MuonDimensionNumbers)
ADAM = optax.adam(1e-2)
PARTIAL = {
    "masked": optax.masked(ADAM, kernels),
    "partition": optax.partition(
        {"t": ADAM, "f": optax.set_to_zero()}, frozen_but_last
    ),
    "muon": optax.contrib.muon(1e-2, muon_weight_dimension_numbers=numbers),
    "sm3": optax.sm3(1e-2),
}


@pytest.mark.parametrize("transformation", PARTIAL.values(), ids=PARTIAL)
def test_an_optimizer_that_leaves_parameters_out_goes_on(transformation):
    x = random_array(1, (5, 4), "float32")

    @nnx.jit
    def once(model, optimizer):
        gradients = nnx.grad(
            lambda m: jnp.sum((m.last(jnp.tanh(m.first(x))) - 1) ** 2)
        )(model)
        optimizer.update(model, gradients)

    def trained(*both):
        for _ in range(2):
            once(*both)

    flax = small()
    theirs = nnx.Optimizer(flax, transformation, wrt=nnx.Param)
    with jax.numpy_rank_promotion("allow"):
        trained(flax, theirs)
        model, optimizer = nnx.clone((flax, theirs))
        convert(model, optimizer)
        trained(flax, theirs)
        trained(model, optimizer)
    revert(model, optimizer)
    states = nnx.state((model, optimizer)), nnx.state((flax, theirs))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for mine, expected in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_pair_in_the_place_of_an_array_is_moved():
    kernel = jnp.arange(6.0).reshape(2, 3)
    split = optax.contrib.split_real_and_imaginary(optax.trace(0.9))
    tree = {"up": {"kernel": kernel + 1j * kernel, "bias": jnp.ones(3)}}
    state = split.init(tree)
    _, state = split.update(tree, state)
    held = convert_tree(state, ["up"]).inner_state.trace["up"]["weight"]
    np.testing.assert_array_equal(held.imaginary, kernel.T)
    assert jax.tree.structure(revert_tree(convert_tree(state, ["up"]), ["up"])) == (
        jax.tree.structure(state)
    )


def test_an_ensemble_of_models_and_optimizers_is_converted():
    @nnx.vmap
    def ensemble(key):
        model = nnx.Dict(layer=nnx.Linear(4, 6, rngs=nnx.Rngs(key)))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        return model, optimizer

    model, optimizer = ensemble(jax.random.split(jax.random.key(0), 3))
    convert(model, optimizer)
    assert optimizer.opt_state[0].mu["layer"]["weight"].shape == (3, 6, 4)
    assert optimizer.opt_state[0].count.shape == (3,)


def test_an_abstract_model_and_its_optimizer_are_converted():
    def both():
        model = small()
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    model, optimizer = nnx.eval_shape(both)
    convert(model, optimizer)
    assert optimizer.opt_state[0].mu["first"]["weight"].shape == (6, 4)


def test_a_mask_that_looks_at_values_is_no_obstacle():
    def is_not_zero(parameters):
        return jax.tree.map(lambda p: bool(jnp.any(p != 0)), parameters)

    model = small()
    masked = optax.masked(optax.adam(1e-2), is_not_zero)
    optimizer = nnx.Optimizer(model, masked, wrt=nnx.Param)
    convert(model, optimizer)
    mu = optimizer.opt_state.inner_state[0].mu["first"]
    assert mu["weight"].shape == (6, 4)
    assert isinstance(mu["bias"].get_value(), optax.MaskedNode)


def test_a_sharding_of_a_stack_keeps_the_axis_of_the_stack():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a"))
    abstract = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32, sharding=sharding)
    converted = convert_tree({"kernel": abstract}, [""])["weight"]
    assert converted.sharding.spec == P("a", None, None)
    assert converted.shape == (2, 8, 4)


def of_another(make_other, model=small, change=convert, transformation=ADAM):
    """An optimizer of another model, in the place of that of a model."""
    other = make_other()
    optimizer = nnx.Optimizer(other, transformation, wrt=nnx.Param)
    return change, model(), optimizer


def late():
    """A model that was converted without its optimizer."""
    model = small()
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    convert(model)
    return convert, model, optimizer


def of(transformation, wrt=nnx.Param, width=4):
    model = small(width)
    return convert, model, nnx.Optimizer(model, transformation, wrt=wrt)


BELONGS = "`optimizer` must belong to `model`"
CONVERTED = "`optimizer` must have a state that can be converted: it would have shape"
OPTIMIZERS_REFUSED = {
    "another width": (
        lambda: of_another(lambda: small(5)),
        f"{BELONGS}: its state has shape (5, 6) at '0.mu.first.kernel' in ScaleByAdamSt"
        "ate.mu, where the model's has shape (4, 6). Convert both in one call",
    ),
    "other paths": (
        lambda: of_another(lambda: nnx.Dict(decoder=small())),
        f"{BELONGS}: its state has shape (6,) at '0.mu.decoder.first.bias' in ",
    ),
    "a part of the model": (
        lambda: of_another(lambda: nnx.Dict(first=small().first)),
        f"{BELONGS}: its state has nothing at '0.mu.last.bias', where the model's",
    ),
    "converted already": (late, f"{BELONGS}: its state has shape (4, 6) at"),
    "not converted": (
        lambda: of_another(small, lambda: converted_small(), revert),
        f"{BELONGS}: its state has shape (4, 6) at '0.mu.first.kernel'",
    ),
    "one that holds another": (
        lambda: (convert, small(), nnx.ModelAndOptimizer(small(), ADAM)),
        f"{BELONGS}, got one of another model",
    ),
    "a mask of names": (
        lambda: of(optax.masked(ADAM, is_named("kernel"))),
        f"{CONVERTED} (6, 4) at 'inner_state.0.mu.first.weight' in ScaleByAdamState.mu,"
        " where a new state has nothing. A mask, a label or a filter must be a functio",
    ),
    "a filter of names": (
        lambda: of(ADAM, nnx.PathContains("kernel")),
        f"{CONVERTED} (6, 4) at '0.mu.first.weight' in ScaleByAdamState.mu,",
    ),
    "a mask that is a tree": (
        lambda: of(optax.freeze(kernels(nnx.state(small())))),
        "`optimizer` must have a `tx` that starts for the converted model. A mask,",
    ),
    "a factored state": (
        lambda: of(optax.adafactor(0.1, min_dim_size_to_factor=2)),
        "`optimizer` must have 2 axes or more at 'first.kernel' in FactoredState.v_row",
    ),
    "a projection": (
        lambda: of(optax.contrib.galore(0.1), width=6),
        "`optimizer` must have none of a projection at 'first.kernel' in GaLoreState",
    ),
    "one vector": (
        lambda: of(optax.flatten(ADAM)),
        "`optimizer` must keep the parameters apart: its state has one vector of all at"
        " '0.mu' in ScaleByAdamState.mu",
    ),
}


def converted_small():
    model = small()
    convert(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"), OPTIMIZERS_REFUSED.values(), ids=OPTIMIZERS_REFUSED
)
def test_an_optimizer_that_does_not_fit_is_refused_and_nothing_is_changed(
    make, message
):
    change, model, optimizer = make()
    before = nnx.split((model, optimizer))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        change(model, optimizer)
    after = nnx.split((model, optimizer))
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])


def test_an_optimizer_that_holds_its_model_is_converted_with_it():
    model = small()
    optimizer = nnx.ModelAndOptimizer(model, ADAM)
    convert(model, optimizer)
    assert optimizer.opt_state[0].mu["first"]["weight"].shape == (6, 4)


# Which axes are whose.


def test_the_layers_of_a_model_are_found_by_path():
    model = Decoder(nnx.Rngs(0))
    flax = layers_of(model, (nnx.Linear, nnx.LinearGeneral))
    assert flax.pop("adapted.base_module") == (1, 1)
    assert layers_of(model) == {}
    report = convert(model)
    assert layers_of(model) == report.converted == flax
    with pytest.raises(
        TypeError, match=r"^`model` must be a flax.nnx.Module, got dict"
    ):
        layers_of({})


def test_dimension_numbers_are_those_of_the_axes_before_and_after():
    layers = {"up": (1, 1), "query": (1, 2), "out": (2, 1)}
    shapes = {"up": (3, 4, 5), "query": (4, 2, 3), "out": (2, 3, 4)}
    tree = {
        name: {"bias": jnp.ones(2), "kernel": jnp.ones(shape)}
        for name, shape in shapes.items()
    }
    tree |= {"norm": {"scale": jnp.ones(2)}, "kernel": {"up": {"kernel": jnp.ones(2)}}}
    kind = optax.contrib.GaLoreDimensionNumbers
    # As in a model of Linen's, whose optimizer masks what it leaves out.
    tree["up"]["bias"] = optax.MaskedNode()
    of = dimension_numbers(layers, kind)({"params": tree})["params"]
    assert of["up"] == {"bias": optax.MaskedNode(), "kernel": kind((-2,), (-1,))}
    assert of["query"] == {"bias": None, "kernel": kind((-3,), (-2, -1))}
    assert of["out"] == {"bias": None, "kernel": kind((-3, -2), (-1,))}
    assert (of["norm"], of["kernel"]) == ({"scale": None}, {"up": {"kernel": None}})
    of = dimension_numbers(layers, kind)(convert_tree(tree, layers))
    assert of["up"]["weight"] == kind((-1,), (-2,))
    assert of["query"]["weight"] == kind((-1,), (-3, -2))
    assert of["out"]["weight"] == kind((-2, -1), (-3,))


def test_an_optimizer_that_cannot_be_converted_leaves_the_model_as_it_was():
    model = nnx.Sequential(nnx.Linear(256, 128, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adafactor(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"start this state anew"):
        convert(model, optimizer)
    assert type(model.layers[0]) is nnx.Linear
    assert optimizer.opt_state[0].v_row["layers"][0].keys() == {"bias", "kernel"}
