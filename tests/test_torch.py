"""PyTorch's names, layout and files, without PyTorch. The deep tier has it."""

import json
import os
import pickle
import stat
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import jaxlinear.linen
from jaxlinear.nnx import Linear
from jaxlinear.torch import LeftOut, _files, load, save

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


class MLP(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.up = Linear(3, 4, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Linear(4, 4, param_dtype=dtype, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](nnx.relu(self.up(x)))


SHAPES = {
    "up.weight": (4, 3),
    "up.bias": (4,),
    "layers.0.weight": (4, 4),
    "layers.0.bias": (4,),
}


def random_state(dtype="float32", shapes=SHAPES, prefix=""):
    """A state dict with all bits, those of NaNs among them."""
    generator = np.random.default_rng(0)

    def random(shape):
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        return np.frombuffer(generator.bytes(size), jnp.dtype(dtype)).reshape(shape)

    return {prefix + name: random(shape) for name, shape in shapes.items()}


def bits(array):
    return np.asarray(array).tobytes()


def assert_has(model, state):
    assert bits(model.up.weight[...]) == bits(state["up.weight"])
    assert bits(model.layers[0].bias[...]) == bits(state["layers.0.bias"])


def model_of(dtype="float32"):
    """A module with parameters of a dtype that nobody could draw."""
    model = MLP(nnx.Rngs(0))
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(variable.get_value().astype(dtype))
    return model


KINDS = ["model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_saved_and_loaded_bit_for_bit(dtype, file, tmp_path):
    model, state = model_of(dtype), random_state(dtype)
    assert load(model, state) == LeftOut()
    assert_has(model, state)
    save(model, tmp_path / file)
    other = model_of(dtype)
    assert load(other, tmp_path / file) == LeftOut()
    assert_has(other, state)


def test_float64_is_loaded_bit_for_bit():
    with jax.enable_x64(True):
        state = random_state("float64")
        model = MLP(nnx.Rngs(0), jnp.float64)
        load(model, state)
        assert_has(model, state)


def test_a_file_is_that_of_the_safetensors_package(tmp_path):
    state = random_state("bfloat16")
    load(model := model_of("bfloat16"), state)
    save(model, path := tmp_path / "model.safetensors")
    found = load_file(path)
    assert {n: bits(a) for n, a in found.items()} == {
        n: bits(a) for n, a in state.items()
    }
    save_file(state, path)
    load(other := model_of("bfloat16"), path)
    assert_has(other, state)


def test_a_single_layer_has_the_names_of_pytorch(tmp_path):
    layer = Linear(3, 4, rngs=nnx.Rngs(0))
    save(layer, path := tmp_path / "layer.safetensors")
    assert {n: a.shape for n, a in load_file(path).items()} == {
        "weight": (4, 3),
        "bias": (4,),
    }


def test_linen_variables_are_loaded_into_a_new_tree(tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxlinear.linen.Linear(
                4,
                name="up",
                kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "a")),
            )(x)
            return nn.BatchNorm(use_running_average=True, name="norm")(x)

    variables = Model().init(jax.random.key(0), jnp.ones((2, 3)))
    names = {"up.weight": (4, 3), "up.bias": (4,)}
    names |= {
        f"norm.{n}": (4,) for n in ("weight", "bias", "running_mean", "running_var")
    }
    state = random_state(shapes=names)
    rename = {
        "norm.scale": "norm.weight",
        "norm.mean": "norm.running_mean",
        "norm.var": "norm.running_var",
    }
    loaded = load(variables, state, rename=rename)
    weight = loaded["params"]["up"]["weight"]
    assert isinstance(weight, nn.Partitioned)
    assert bits(weight.value) == bits(state["up.weight"])
    assert bits(loaded["batch_stats"]["norm"]["var"]) == bits(state["norm.running_var"])
    assert float(variables["params"]["up"]["weight"].value[0, 0]) == 1
    save(loaded, path := tmp_path / "model.safetensors", rename=rename)
    assert load_file(path).keys() == state.keys()
    tree, left_out = load(
        variables, {**state, "x": np.ones(1)}, rename=rename, strict=False
    )
    assert left_out == LeftOut(unexpected=("x",))
    assert bits(tree["params"]["up"]["bias"]) == bits(state["up.bias"])


def test_what_does_not_fit_is_listed_and_nothing_is_changed():
    state = random_state()
    state["up.weight"] = np.ones((5, 3), "float32")
    state["up.bias"] = np.ones(4, "float16")
    del state["layers.0.bias"]
    state["extra"] = np.ones(1)
    model = model_of()
    before = jax.tree.map(bits, nnx.state(model))
    with pytest.raises(ValueError, match=r"^`source` must fit `target`") as error:
        load(model, state)
    assert str(error.value).splitlines()[1:] == [
        "missing (1):",
        "  layers.0.bias",
        "unexpected (1):",
        "  extra",
        "wrong shape (1):",
        "  up.weight: expected (4, 3), got (5, 3)",
        "wrong dtype (1):",
        "  up.bias: expected float32, got float16",
    ]
    assert jax.tree.map(bits, nnx.state(model)) == before
    left_out = load(model, state, strict=False)
    assert left_out.missing == ("layers.0.bias",)
    assert left_out.unexpected == ("extra",)
    assert left_out.wrong_shape.keys() == {"up.weight"}
    assert left_out.wrong_dtype.keys() == {"up.bias"}
    assert bits(model.layers[0].weight[...]) == bits(state["layers.0.weight"])


class Blocks(nnx.Module):
    """With square weights in each block, beside one that is not."""

    def __init__(self, rngs):
        self.table = nnx.Embed(4, 4, rngs=rngs)  # Which nobody transposes.
        self.head = Linear(4, 2, rngs=rngs)
        self.blocks = nnx.List(
            nnx.Dict(
                attention=nnx.Dict(
                    qkv=Linear(4, 12, rngs=rngs), out=Linear(4, 4, rngs=rngs)
                ),
                only=nnx.Dict(square=Linear(4, 4, rngs=rngs)),
            )
            for _ in "12"
        )


def state_of(model):
    """Its tensors as PyTorch has them, drawn at random."""
    flat = nnx.to_flat_state(nnx.state(model))
    shapes = {".".join(map(str, path)): v.get_value().shape for path, v in flat}
    return random_state(shapes=shapes)


def test_square_weights_among_transposed_ones_are_suspected_and_not_loaded():
    state = state_of(model := Blocks(nnx.Rngs(0)))
    # As in the checkpoints of GPT-2: every weight of the blocks, and not the head.
    turned = {
        n: a.T if n.startswith("blocks") and a.ndim == 2 else a
        for n, a in state.items()
    }
    before = jax.tree.map(bits, nnx.state(model))
    with pytest.raises(ValueError, match=r"^`source` must fit `target`") as error:
        load(model, turned)
    assert str(error.value).splitlines()[1:] == [
        "wrong shape (2):",
        "  blocks.0.attention.qkv.weight: expected (12, 4), got (4, 12) (transposed?)",
        "  blocks.1.attention.qkv.weight: expected (12, 4), got (4, 12) (transposed?)",
        "perhaps transposed (4):",
        "  blocks.0.attention.out.weight: as blocks.0.attention.qkv.weight is",
        "  blocks.0.only.square.weight: as blocks.0.attention.qkv.weight is",
        "  blocks.1.attention.out.weight: as blocks.1.attention.qkv.weight is",
        "  blocks.1.only.square.weight: as blocks.1.attention.qkv.weight is",
    ]
    assert jax.tree.map(bits, nnx.state(model)) == before
    left_out = load(model, turned, strict=False)
    assert len(left_out.wrong_shape) + len(left_out.perhaps_transposed) == 6
    square = model.blocks[0].attention.out
    assert bits(square.weight[...]) == before["blocks"][0]["attention"]["out"]["weight"]
    assert bits(model.head.weight[...]) == bits(state["head.weight"])
    # Transposed by their names, all are right.
    assert not any(load(model, {n: state[n] for n in turned}))
    assert bits(square.weight[...]) == bits(state["blocks.0.attention.out.weight"])


@pytest.mark.parametrize("stacked", ["a list", "a stack"])
def test_stacked_square_weights_among_transposed_ones_are_suspected(stacked):
    tree = {
        "layers": {"up.weight": np.ones((2, 4, 3)), "mix.weight": np.ones((2, 4, 4))}
    }
    if stacked == "a stack":
        state = {"layers.up.weight": np.ones((2, 3, 4))}
        state["layers.mix.weight"] = np.ones((2, 4, 4))
        names = ["layers.mix.weight"]
    else:
        state = {f"layers.{i}.up.weight": np.ones((3, 4)) for i in range(2)}
        names = [f"layers.{i}.mix.weight" for i in range(2)]
        state |= dict.fromkeys(names, np.ones((4, 4)))
    tree, left_out = load(tree, state, strict=False)
    assert [*left_out.perhaps_transposed] == names
    assert all("(transposed?)" in why for why in left_out.wrong_shape.values())


KERNELS = {
    "of the source": ("up.weight", "up.kernel"),
    "of Linen": ("up.kernel", "up.weight"),
}


@pytest.mark.parametrize(("here", "there"), KERNELS.values(), ids=KERNELS)
def test_a_square_kernel_is_not_taken_for_a_weight(here, there):
    tree = {"params": {"up": {_last(here): np.zeros((3, 3))}}}
    state = {there: np.ones((3, 3))}
    with pytest.raises(
        ValueError,
        match=rf"perhaps transposed \(1\):\n  {there}: for {here}: a weight is",
    ):
        load(tree, state, rename={here: there})
    # Beside one whose shape shows that it came right, it is.
    tree["params"]["down"] = {_last(here): np.zeros((2, 3))}
    state[other := f"down.{_last(there)}"] = np.ones((2, 3))
    load(tree, state, rename={here: there, f"down.{_last(here)}": other})


def _last(name):
    return name.rpartition(".")[2]


def test_nothing_is_suspected_where_no_shape_shows_it():
    def linears(sizes):
        return {f"{i}": {"weight": np.zeros(size)} for i, size in enumerate(sizes)}

    def source(sizes):
        return {f"{i}.weight": np.ones(size) for i, size in enumerate(sizes)}

    # All are square; there is one layer; the others came right.
    for sizes in [(4, 4)] * 3, [(4, 4)], [(4, 4), (3, 4), (4, 3)]:
        load(linears(sizes), source(sizes))
    # One element is the same either way.
    _, left_out = load(
        linears([(1, 1), (3, 4)]), source([(1, 1), (4, 3)]), strict=False
    )
    assert not left_out.perhaps_transposed
    # Another shape is not the one the other way round; nor is a vector or an embedding.
    target = linears([(4, 4), (3, 4)]) | {"table": {"embedding": np.zeros((5, 2))}}
    others = source([(4, 4), (3, 5)]) | {"table.embedding": np.ones((2, 5))}
    _, left_out = load(target, others, strict=False)
    assert left_out == LeftOut(
        wrong_shape={
            "1.weight": "expected (3, 4), got (3, 5)",
            "table.embedding": "expected (5, 2), got (2, 5) (transposed?)",
        }
    )
    # A square patch is not a square matrix.
    model = nnx.Dict(
        conv=nnx.Conv(2, 3, (5, 5), rngs=nnx.Rngs(0)), up=Linear(3, 4, rngs=nnx.Rngs(0))
    )
    state = random_state(shapes={"conv.weight": (3, 2, 5, 5), "up.weight": (3, 4)})
    assert not load(model, state, strict=False).perhaps_transposed
    # The nearest weights decide: those of a block are right beside a transposed head.
    target = {"head": {"weight": np.zeros((2, 4))}, "block": linears([(4, 4), (3, 4)])}
    others = {f"block.{n}": a for n, a in source([(4, 4), (3, 4)]).items()}
    _, left_out = load(target, others | {"head.weight": np.ones((4, 2))}, strict=False)
    assert left_out.wrong_shape.keys() == {"head.weight"}
    assert not left_out.perhaps_transposed


class Mixed(nnx.Module):
    """One of each layer of Flax's that PyTorch also has."""

    def __init__(self, rngs):
        def norm(kind, **options):
            return kind(num_features=4, rngs=rngs, **options)

        self.table = nnx.Embed(5, 4, rngs=rngs)
        self.norms = nnx.List(
            [
                norm(nnx.LayerNorm),
                norm(nnx.RMSNorm),
                norm(nnx.GroupNorm, num_groups=2),
                norm(nnx.InstanceNorm),
            ]
        )
        self.bn = norm(nnx.BatchNorm)
        self.conv = nnx.Conv(2, 6, (3, 5), feature_group_count=2, rngs=rngs)
        self.square = nnx.Conv(3, 3, 3, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.query = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)
        self.ours = Linear(4, 3, rngs=rngs)


TORCH_SHAPES = {
    "table.weight": (5, 4),
    **{f"norms.{i}.weight": (4,) for i in range(4)},
    **{f"norms.{i}.bias": (4,) for i in (0, 2, 3)},
    **{f"bn.{n}": (4,) for n in ("weight", "bias", "running_mean", "running_var")},
    "conv.weight": (6, 1, 3, 5),
    "conv.bias": (6,),
    "square.weight": (3, 3, 3),
    "square.bias": (3,),
    "up.weight": (4, 4),
    "up.bias": (4,),
    "query.weight": (6, 4),
    "query.bias": (6,),
    "out.weight": (4, 6),
    "out.bias": (4,),
    "ours.weight": (3, 4),
    "ours.bias": (3,),
}


def test_layers_of_flax_have_the_names_and_the_layout_of_pytorch(tmp_path):
    state = random_state(shapes=TORCH_SHAPES)
    model = Mixed(nnx.Rngs(0))
    counter = {"bn.num_batches_tracked": np.array(7)}
    assert load(model, state | counter) == LeftOut()
    assert bits(model.table.embedding[...]) == bits(state["table.weight"])
    assert bits(model.norms[3].scale[...]) == bits(state["norms.3.weight"])
    assert bits(model.bn.mean[...]) == bits(state["bn.running_mean"])
    assert bits(model.bn.var[...]) == bits(state["bn.running_var"])
    moved = {
        "conv": (model.conv, (2, 3, 1, 0)),
        "square": (model.square, (2, 1, 0)),
        "up": (model.up, (1, 0)),
        "query": (model.query, (1, 0)),
        "out": (model.out, (1, 0)),
    }
    for name, (layer, order) in moved.items():
        expected = state[f"{name}.weight"].transpose(order)
        assert bits(layer.kernel[...]) == bits(expected)
    save(model, path := tmp_path / "model.safetensors", prefix="a.")
    found = load_file(path)
    assert {n: (a.shape, bits(a)) for n, a in found.items()} == {
        f"a.{n}": (a.shape, bits(a)) for n, a in state.items()
    }
    load(other := Mixed(nnx.Rngs(1)), path, prefix="a.")
    assert jax.tree.map(bits, nnx.state(other, nnx.Param)) == jax.tree.map(
        bits, nnx.state(model, nnx.Param)
    )


def test_names_of_flax_are_taken_where_the_source_has_them(tmp_path):
    filled = nnx.state(Mixed(nnx.Rngs(0)), nnx.Any(nnx.Param, nnx.BatchStat))
    flat = nnx.to_flat_state(filled)
    state = {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}
    state["query.bias"] = state["query.bias"].reshape(-1)
    load(model := Mixed(nnx.Rngs(1)), state)
    for name, layer in {"up": model.up, "conv": model.conv, "out": model.out}.items():
        assert bits(layer.kernel[...]) == bits(state[f"{name}.kernel"])
    assert bits(model.bn.mean[...]) == bits(state["bn.mean"])
    # Both at once are one too many.
    both = {
        "scale": np.ones(4, "f"),
        "weight": np.ones(4, "f"),
        "bias": np.ones(4, "f"),
    }
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n  scale$"):
        load(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), both)


def test_a_path_keeps_or_changes_the_name_that_flax_gave():
    state = {"gamma": np.ones(4, "f"), "n.bias": np.ones(4, "f")}
    norm = nnx.Dict(norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    load(norm, state, rename={"norm.scale": "gamma", "norm": "n"})
    for rename in {"norm": "n"}, lambda name: name.replace("norm", "n"):
        load(
            norm,
            {"n.weight": np.full(4, 2, "f"), "n.bias": np.ones(4, "f")},
            rename=rename,
        )
        assert float(norm.norm.scale[0]) == 2
    # A kernel is transposed where PyTorch's name is, and nowhere else.
    layer, kernel = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)), np.eye(3, k=1)
    kernel = kernel.astype("f")
    for name, expected in {"weight": kernel.T, "w": kernel, "kernel": kernel}.items():
        load(layer, {name: kernel}, rename={"kernel": name})
        assert bits(layer.kernel[...]) == bits(expected)


def test_stacked_layers_of_flax_are_those_of_a_list(tmp_path):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def layers(rngs):
        return nnx.Dict(
            norm=nnx.BatchNorm(3, rngs=rngs), conv=nnx.Conv(3, 3, 3, rngs=rngs)
        )

    shapes = {"conv.weight": (3, 3, 3), "conv.bias": (3,)}
    shapes |= {
        f"norm.{n}": (3,) for n in ("weight", "bias", "running_mean", "running_var")
    }
    state = random_state(
        shapes={f"h.{i}.{n}": s for i in range(2) for n, s in shapes.items()}
    )
    counters = {f"h.{i}.norm.num_batches_tracked": np.array(7) for i in range(2)}
    load(stack := nnx.Dict(h=layers(nnx.Rngs(0))), state | counters)
    kernel = np.stack(
        [state[f"h.{i}.conv.weight"].transpose(2, 1, 0) for i in range(2)]
    )
    assert bits(stack.h.conv.kernel[...]) == bits(kernel)
    save(stack, path := tmp_path / "list.safetensors", rename={"h": "h.{}"})
    assert {n: bits(a) for n, a in load_file(path).items()} == {
        n: bits(a) for n, a in state.items()
    }


def test_a_sharded_kernel_of_flax_is_read_by_shards():
    mesh = jax.make_mesh((8,), ("x",))
    layer = nnx.Linear(16, 24, use_bias=False, rngs=nnx.Rngs(0))
    sharding = NamedSharding(mesh, P(None, "x"))
    layer.kernel.set_value(jax.device_put(layer.kernel[...], sharding))
    state = random_state(shapes={"weight": (24, 16)})
    load(layer, state)
    assert layer.kernel[...].sharding == sharding
    assert bits(layer.kernel[...]) == bits(state["weight"].T)


def test_linen_variables_have_the_names_of_pytorch_where_names_tell(tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(5, 4, name="table")(tokens)
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
            return jaxlinear.linen.Linear(4, name="up")(x)

    variables = Model().init(jax.random.key(0), jnp.zeros((2, 3), int))
    names = {"table.weight": (5, 4), "up.weight": (4, 4), "up.bias": (4,)}
    names |= {
        f"norm.{n}": (4,) for n in ("weight", "bias", "running_mean", "running_var")
    }
    state = random_state(shapes=names)
    counter = {"norm.num_batches_tracked": np.array(3)}
    loaded = load(variables, state | counter)
    save(loaded, path := tmp_path / "model.safetensors")
    assert {n: bits(a) for n, a in load_file(path).items()} == {
        n: bits(a) for n, a in state.items()
    }
    # Two that would be called the same keep their names.
    both = {"params": {"a": {"scale": np.ones(2), "weight": np.ones(2)}}}
    save(both, path)
    assert load_file(path).keys() == {"a.scale", "a.weight"}


def test_a_parameter_that_only_pytorch_ties_has_several_names(tmp_path):
    model = nnx.Dict(
        wte=nnx.Embed(5, 4, rngs=nnx.Rngs(0)), up=Linear(4, 4, rngs=nnx.Rngs(0))
    )
    rename = {"wte.embedding": ("wte.weight", "lm_head.weight"), "up": "h.up"}
    shapes = {"wte.weight": (5, 4), "h.up.weight": (4, 4), "h.up.bias": (4,)}
    state = random_state(shapes=shapes)
    load(model, state, rename=rename)
    save(model, path := tmp_path / "model.safetensors", rename=rename, prefix="m.")
    found = load_file(path)
    assert found.keys() == {f"m.{name}" for name in (*state, "lm_head.weight")}
    assert bits(found["m.lm_head.weight"]) == bits(state["wte.weight"])
    assert load(model, path, rename=rename, prefix="m.") == LeftOut()
    load(model, path, rename=lambda n: rename.get(n, f"h.{n}"), prefix="m.")
    different = {**state, "lm_head.weight": np.ones((5, 4), "float32")}
    with pytest.raises(
        ValueError, match=r"untied \(1\):\n  lm_head.weight: it differs"
    ):
        load(model, different, rename=rename)


def test_tensors_that_are_named_are_ignored_and_no_others():
    state = {f"t.{n}": a for n, a in random_state().items()}
    extra = {
        "t.h.0.attn.bias": np.ones(1),
        "t.h.1.attn.bias": np.ones(1),
        "t.head": np.ones(1),
    }
    assert not any(
        load(model_of(), state | extra, prefix="t.", ignore=["*.attn.bias", "t.head"])
    )
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n  t.head$"):
        load(model_of(), state | extra, prefix="t.", ignore=("*.attn.bias",))
    # What a parameter takes is not left over.
    load(model := model_of(), random_state(), ignore=["*"])
    assert_has(model, random_state())


HINTS = {
    "module.": "with `prefix='module.'`",
    "_orig_mod.": "with `prefix='_orig_mod.'`",
    "_orig_mod.module.": "with `prefix='_orig_mod.module.'`",
    "model.": "with `prefix='model.'`",
}


@pytest.mark.parametrize("prefix", HINTS)
def test_a_prefix_that_is_missing_is_named(prefix):
    state = random_state(prefix=prefix)
    message = rf"\n4 of 4 parameters are found {HINTS[prefix]}$"
    with pytest.raises(ValueError, match=message):
        load(model_of(), state)
    with pytest.raises(ValueError, match=message):
        load(model_of(), state, prefix="x.")
    # Not all need be there, and other things may.
    del state[f"{prefix}up.bias"]
    with pytest.raises(ValueError, match=rf"\n3 of 4 .* {HINTS[prefix]}$"):
        load(model_of(), state | {"step": np.ones(1)})


def test_wrappers_inside_of_names_are_named():
    state = {
        name.replace("up.", "up._orig_mod.").replace("layers.", "layers.module."): array
        for name, array in random_state().items()
    }
    with pytest.raises(
        ValueError,
        match=r"\n4 of 4 parameters are found without _orig_mod. and module. in the"
        r" names of the source$",
    ):
        load(model_of(), state)
    # Where nothing is known, nothing is said.
    with pytest.raises(ValueError, match=r"missing \(1\):\n  up.weight$"):
        load(model_of(), {n: a for n, a in random_state().items() if n != "up.weight"})


def test_names_are_changed_by_a_function_a_mapping_and_a_prefix():
    names = {"up": "first", "layers.0": "second"}
    state = {
        f"model.{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": a
        for n, a in random_state().items()
    }
    for rename in (
        names,
        lambda name: name.replace("up", "first").replace("layers.0", "second"),
    ):
        model = model_of()
        load(model, {**state, "other.x": np.ones(1)}, rename=rename, prefix="model.")
        assert bits(model.up.weight[...]) == bits(state["model.first.weight"])


def test_tied_parameters_have_all_their_names(tmp_path):
    model = model_of()
    model.head = nnx.data(model.up)
    state = random_state()
    load(model, state)
    save(model, path := tmp_path / "model.safetensors")
    assert load_file(path).keys() == {*state, "head.weight", "head.bias"}
    assert load(model, path) == LeftOut()
    different = {**load_file(path), "up.bias": np.ones(4, "float32")}
    with pytest.raises(
        ValueError, match=r"untied \(1\):\n  up.bias: it differs from head"
    ):
        load(model, different)


def test_stacked_layers_are_those_of_a_list(tmp_path):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: MLP(rngs))
            self.blocks = nnx.split_rngs(splits=3)(make)(rngs)

    shapes = {f"blocks.{i}.{n}": s for i in range(3) for n, s in SHAPES.items()}
    state = random_state(shapes=shapes)
    model = Stack(nnx.Rngs(0))
    load(model, state)
    weight = np.stack([state[f"blocks.{i}.up.weight"] for i in range(3)])
    assert bits(model.blocks.up.weight[...]) == bits(weight)
    load(renamed := Stack(nnx.Rngs(1)), state, rename={"blocks": "blocks.{}"})
    assert bits(renamed.blocks.up.weight[...]) == bits(weight)
    save(model, path := tmp_path / "list.safetensors", rename={"blocks": "blocks.{}"})
    assert {n: bits(a) for n, a in load_file(path).items()} == {
        n: bits(a) for n, a in state.items()
    }
    save(model, path := tmp_path / "stack.safetensors")
    assert load_file(path)["blocks.up.weight"].shape == (3, 4, 3)
    load(Stack(nnx.Rngs(0)), path)
    # A list that is longer or shorter is another one.
    with pytest.raises(ValueError, match=r"unexpected"):
        load(model, state | {"blocks.3.up.weight": weight[0]})
    with pytest.raises(ValueError, match=r"missing"):
        load(model, {n: a for n, a in state.items() if n != "blocks.2.up.bias"})


def test_a_projection_of_several_axes_is_the_matrix_of_pytorch(tmp_path):
    layer = Linear((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0))
    save(layer, path := tmp_path / "layer.safetensors")
    found = load_file(path)
    assert (found["weight"].shape, found["bias"].shape) == ((20, 6), (20,))
    assert bits(found["weight"]) == bits(layer.weight[...])
    other = Linear((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(1))
    load(other, path)
    assert bits(other.weight[...]) == bits(layer.weight[...])


def test_each_device_reads_its_own_shard_and_nothing_more(tmp_path, monkeypatch):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    layer = Linear(16, 32, device=sharding, rngs=nnx.Rngs(0))
    save(layer, path := tmp_path / "layer.safetensors")
    with jax.set_mesh(mesh):
        # An abstract model has no value before.
        abstract = nnx.eval_shape(lambda: Linear(16, 32, rngs=nnx.Rngs(0)))
    for variable in abstract.weight, abstract.bias:
        variable.set_value(variable.get_value().update(sharding=sharding))
    read = []
    make = jax.make_array_from_callback

    def recorded(shape, sharding, callback):
        def recorded_read(index):
            read.append(callback(index).shape)
            return callback(index)

        return make(shape, sharding, recorded_read)

    monkeypatch.setattr(jax, "make_array_from_callback", recorded)
    for target in Linear(16, 32, device=sharding, rngs=nnx.Rngs(1)), abstract:
        read.clear()
        load(target, path)
        assert sorted(read) == [(4,)] * 8 + [(4, 16)] * 8
        assert target.weight[...].sharding == layer.weight[...].sharding
        assert bits(target.weight[...]) == bits(layer.weight[...])


def test_what_is_loaded_is_a_copy_and_stays_where_it_was():
    model, array = model_of(), np.zeros((4, 3), np.float32)
    load(model, {**random_state(), "up.weight": array})
    array += 1
    assert float(jnp.max(model.up.weight[...])) == 0
    # Nothing bound to a device that was not.
    assert not model.up.weight[...].committed


# Files.


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    model = model_of()
    for file in KINDS:
        save(model, tmp_path / file)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(file, arrays):
        file.write_bytes(b"half of ")
        raise OSError("no space left on device")

    monkeypatch.setattr(_files, "_write_safetensors", full_disk)
    for file in KINDS:
        with pytest.raises(OSError, match="no space"):
            save(model, tmp_path / file)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


TARGETS = {
    "a missing folder": (lambda p: p / "missing" / "m", FileNotFoundError),
    "a file as a folder": (lambda p: p / "file" / "m", NotADirectoryError),
    "a folder": (lambda p: p / "folder", IsADirectoryError),
    "a name that is too long": (lambda p: p / ("m" * 250), OSError),
    "no file of the disk": (lambda p: p / "pipe", OSError),
}


@pytest.mark.skipif(os.name != "posix", reason="The kinds of files are POSIX's")
@pytest.mark.parametrize(("place", "kind"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("ending", [".safetensors", ".safetensors.index.json"])
def test_a_file_that_cannot_be_written_is_an_os_error_with_its_path(
    place, kind, ending, tmp_path
):
    (tmp_path / "file").touch()
    (tmp_path / f"folder{ending}").mkdir()
    os.mkfifo(tmp_path / f"pipe{ending}")
    before = sorted(tmp_path.rglob("*"))
    path = place(tmp_path)
    path = path.with_name(path.name + ending)
    with pytest.raises(kind) as error:
        save(model_of(), path)
    assert error.value.filename == str(path)
    assert error.value.errno
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / f"pipe{ending}").is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="The limit is POSIX's")
@pytest.mark.parametrize("file", KINDS)
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(file, tmp_path):
    import resource

    save(small := {"x": np.ones(9, "float32")}, path := tmp_path / file)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=f"{file}.*File too large"):
            save({"x": np.ones(9_000, "float32")}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert bits(load(small, path)["x"]) == bits(small["x"])


@pytest.mark.skipif(os.name != "posix", reason="The modes are POSIX's")
@pytest.mark.parametrize("file", KINDS)
def test_a_file_has_the_mode_of_the_umask_or_of_the_old_file(file, tmp_path):
    path, old = tmp_path / file, os.umask(0o027)
    try:
        save(model_of(), path)
        modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        assert modes == {0o640}
        for mode in 0o604, 0o444:
            path.chmod(mode)
            save(model_of(), path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(old)


def test_a_folder_is_refused_with_a_file_in_it(tmp_path):
    save(model_of(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"^`source` must be a file, got the folder .* 'model.safetensors'$",
    ):
        load(model_of(), tmp_path)
    # The index and not one of its files.
    save(model_of(), tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"such as 'model.safetensors.index.json'$"):
        load(model_of(), tmp_path)
    (empty := tmp_path / "empty.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"got the folder '.*empty.safetensors'$"):
        load(model_of(), empty)


def test_a_sharded_file_has_shards_and_replaces_those_before(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_SHARD_BYTES", 80)
    index = tmp_path / "model.safetensors.index.json"
    load(model := model_of(), state := random_state())
    for _ in range(2):
        save(model, index)
        where = json.loads(index.read_text())["weight_map"]
        assert where.keys() == state.keys()
        assert len({*where.values()}) == 2
        assert {p.name for p in tmp_path.iterdir()} == {index.name, *where.values()}
    load(other := model_of(), index)
    assert_has(other, state)


def damaged(path):
    """Files that are not checkpoints, by what is wrong with them."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def forged(change, text=None):
        new = json.loads(json.dumps(header))
        change(new)
        text = text or json.dumps(new)
        return struct.pack("<Q", len(text)) + text.encode() + data

    def swap(new):
        new["up.bias"]["data_offsets"] = new["layers.0.bias"]["data_offsets"]

    twice = (
        json.dumps(header)[:-1] + ', "up.bias": ' + json.dumps(header["up.bias"]) + "}"
    )
    return {
        "empty": b"",
        "truncated": whole[:-1],
        "a longer header": struct.pack("<Q", 1 << 60) + whole[8:],
        "offsets outside": forged(
            lambda new: new["up.bias"].update(data_offsets=[0, 1 << 40])
        ),
        "overlapping offsets": forged(swap),
        "a huge shape": forged(lambda new: new["up.bias"].update(shape=[1 << 60, 4])),
        "a name twice": forged(lambda new: None, twice),
        "a pickle": pickle.dumps(os.getcwd),
    }


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    model = model_of()
    save(model, good := tmp_path / "good.safetensors")
    before = jax.tree.map(bits, nnx.state(model))
    bad = tmp_path / "bad.safetensors"
    for content in damaged(good).values():
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"^`source` must (be a whole|hold)"):
            load(model, bad)
    index = tmp_path / "bad.safetensors.index.json"
    for text in (
        "",
        "[" * 100_000,
        "[]",
        "{}",
        '{"weight_map": {"up.bias": "../x.safetensors"}}',
        '{"weight_map": {"y": "good.safetensors"}}',
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"^`source` must (be an index|hold JSON)"):
            load(model, index)
    assert jax.tree.map(bits, nnx.state(model)) == before


def test_a_sequential_has_the_names_of_pytorch_without_its_own():
    model = nnx.Sequential(Linear(3, 4, rngs=nnx.Rngs(0)))
    state = {n.removeprefix("up."): a for n, a in random_state().items() if "up" in n}
    load(model, {f"0.{n}": a for n, a in state.items()}, rename={"layers": ""})
    assert bits(model.layers[0].weight[...]) == bits(state["weight"])


def test_a_dtype_that_jax_would_narrow_is_refused_and_numpy_keeps_it():
    state = {"x": np.ones(3)}
    abstract = {"x": jax.ShapeDtypeStruct((3,), np.float64)}
    with pytest.raises(ValueError, match=r"x: float64, which needs jax_enable_x64"):
        load(abstract, state)
    loaded = load({"x": np.zeros(3)}, state)["x"]
    assert (type(loaded), loaded.dtype) == (np.ndarray, np.float64)


REFUSED = {
    "another kind of file": (
        ValueError,
        lambda m, p: load(m, p / "x.npz"),
        r"^`source` must end in .safetensors, .*, got 'x.npz'$",
    ),
    "no file": (
        FileNotFoundError,
        lambda m, p: load(m, p / "x.safetensors"),
        "x.safetensors",
    ),
    "no path": (
        TypeError,
        lambda m, p: load(m, 3),
        r"^`source` must be a path or a state dict, got int$",
    ),
    "no state dict": (
        TypeError,
        lambda m, p: load(m, {"model": {}}),
        r"got dict at 'model' \(is the state dict inside of it\?\)$",
    ),
    "no model": (
        TypeError,
        lambda m, p: load(lambda x: x, {}),
        r"^`target` must be an NNX module or a tree of arrays, got function$",
    ),
    "a name that is none": (
        TypeError,
        lambda m, p: load(m, {}, rename=lambda n: None),
        r"^`rename` must return a name for 'layers.0.bias', got None$",
    ),
    "a list of names": (
        TypeError,
        lambda m, p: load(m, {}, rename=["up"]),
        r"^`rename` must be a function or a mapping, got list$",
    ),
    "a list of names to write": (
        TypeError,
        lambda m, p: save(m, p / "x.safetensors", rename=["up"]),
        r"^`rename` must be a function or a mapping, got list$",
    ),
    "no name in a mapping": (
        TypeError,
        lambda m, p: load(m, {}, rename={"up": ["a", "b"]}),
        r"^`rename` must return a name for 'up', got \['a', 'b'\]$",
    ),
    "a path that leads nowhere": (
        ValueError,
        lambda m, p: load(m, random_state(), rename={"weight": "w"}),
        r"^`rename` must have paths .* 'weight'. Did you mean 'layers.0.weight'\?$",
    ),
    "a misspelt path to write": (
        ValueError,
        lambda m, p: save(m, p / "x.safetensors", rename={"layer": "h"}),
        r"^`rename` must have paths .*, got 'layer'. Did you mean 'layers'\?$",
    ),
    "a prefix that is none": (
        TypeError,
        lambda m, p: load(m, {}, prefix=None),
        r"^`prefix` must be a string, got None$",
    ),
    "one pattern that is no list": (
        TypeError,
        lambda m, p: load(m, {}, ignore="*.bias"),
        r"^`ignore` must be a list of names, got '\*.bias'$",
    ),
    "too many axes of a stack": (
        ValueError,
        lambda m, p: load(m, {}, rename={"up": "{}.{}.{}"}),
        r"^`rename` must give 1 places for an index at most, got .* \(4,\)$",
    ),
    "a name twice": (
        ValueError,
        lambda m, p: save(m, p / "x.safetensors", rename=lambda n: "x"),
        r"^`rename` must not give 'x' twice$",
    ),
    "no values": (
        ValueError,
        lambda m, p: save(nnx.eval_shape(model_of), p / "x.safetensors"),
        r"^`source` must have its values .*'layers.0.bias', a ShapeDtypeStruct$",
    ),
    "a dtype that the file cannot have": (
        ValueError,
        lambda m, p: save({"x": np.ones(2, ml_dtypes.int4)}, p / "x.safetensors"),
        r"^`source` must have dtypes that the file can have, got int4 at 'x'$",
    ),
    "another kind of file to write": (
        ValueError,
        lambda m, p: save(m, p / "x"),
        r"^`path` must end in",
    ),
}


@pytest.mark.parametrize(("kind", "call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_loaded_or_saved_is_refused_by_name(
    kind, call, message, tmp_path
):
    with pytest.raises(kind, match=message):
        call(model_of(), tmp_path)
    assert not list(tmp_path.iterdir())
