"""PyTorch's names, layout and files, without PyTorch, which `deep` has, too."""

import json
import os
import pickle
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
from jaxlinear import _state_dicts
from jaxlinear.nnx import Linear
from jaxlinear.torch import LeftOut, load, save

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
    state["up.weight"] = state["up.weight"].T
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
        "  up.weight: expected (4, 3), got (3, 4)",
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
        # Abstract, too: no value is there before.
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

    monkeypatch.setattr(_state_dicts, "_write_safetensors", full_disk)
    for file in KINDS:
        with pytest.raises(OSError, match="no space"):
            save(model, tmp_path / file)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_sharded_file_has_shards_and_replaces_those_before(tmp_path, monkeypatch):
    monkeypatch.setattr(_state_dicts, "_SHARD_BYTES", 80)
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
    """Files that are no checkpoint, by what is wrong with them."""
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
        r"^`source` must have dtypes that the file can have",
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
