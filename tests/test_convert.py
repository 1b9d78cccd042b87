"""Models of Flax with our layer in the place of theirs, and the way back."""

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
from jaxlinear.nnx import Linear, convert, convert_tree, revert, revert_tree

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
    assert report.left_alone == {"adapted.base_module": "it is inside of LoRA"}
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
        "adapted.base_module": "it is inside of LoRA",
        "custom": "it has a dot_general_cls",
        "einsum": "it is an Einsum",
        "general": "it has a batch_axis",
        "lora": "LoRALinear is a subclass",
        "marked": "it has an attribute of its own: mask",
        "narrow": "its preferred_element_type is no wider than its dtype",
        "normed.layer_instance": "it is inside of WeightNorm",
        "product": "it has a dot_general",
        "promotion": "it has a promote_dtype",
        "spectral.layer_instance": "it is inside of SpectralNorm",
        "subclass": "Own is a subclass",
        "tied": "its kernel is reader.0, too",
        "whole": "its param_dtype is no floating dtype",
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


def test_an_optimizer_that_cannot_be_converted_leaves_the_model_as_it_was():
    model = nnx.Sequential(nnx.Linear(256, 128, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adafactor(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"start this state anew"):
        convert(model, optimizer)
    assert type(model.layers[0]) is nnx.Linear
    assert optimizer.opt_state[0].v_row["layers"][0].keys() == {"bias", "kernel"}
