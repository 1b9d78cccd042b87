"""Checkpoints that PyTorch wrote, trained here and given back."""

import errno
import functools
import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import random_array, relative_error, wide

from jaxlinear.nnx import Linear
from jaxlinear.torch import LeftOut, load, save

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

# Relative, after ten layers and three steps: a few hundred eps of float32, and a few
# of bfloat16, in which each layer rounds.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@pytest.fixture(autouse=True)
def _ordinary_promotion():
    """Flax's own layers promote dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def mlp():
    theirs = torch.nn.Sequential(
        torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5)
    )

    def ours(rngs, dtype):
        return nnx.Sequential(
            Linear(12, 32, param_dtype=dtype, rngs=rngs),
            nnx.relu,
            Linear(32, 5, param_dtype=dtype, rngs=rngs),
        )

    return theirs, ours, lambda name: name.removeprefix("layers.")


class EncoderLayer(nnx.Module):
    """torch.nn.TransformerEncoderLayer, with four heads and layers of ours."""

    def __init__(self, rngs, dtype):
        def linear(*sizes):
            return Linear(*sizes, param_dtype=dtype, rngs=rngs)

        self.in_proj, self.out_proj = linear(16, 48), linear(16, 16)
        self.linear1, self.linear2 = linear(16, 32), linear(32, 16)
        norms = [
            nnx.LayerNorm(16, epsilon=1e-5, param_dtype=dtype, rngs=rngs) for _ in "12"
        ]
        self.norm1, self.norm2 = norms

    def __call__(self, x):
        heads = jnp.split(self.in_proj(x), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:-1], 4, 4) for part in heads)
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = self.norm1(x + self.out_proj(attended))
        return self.norm2(x + self.linear2(nnx.relu(self.linear1(x))))


def encoder_layer():
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def rename(name):
        name = name.replace("in_proj.", "self_attn.in_proj_").replace("scale", "weight")
        return name.replace("out_proj", "self_attn.out_proj")

    return theirs, EncoderLayer, rename


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [mlp, encoder_layer])
def test_a_checkpoint_of_pytorch_is_loaded_trained_and_given_back(
    model, dtype, file, tmp_path
):
    theirs, make, rename = model()
    theirs = theirs.to(getattr(torch, dtype))
    write, read = torch.save, torch.load
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file as read
        from safetensors.torch import save_file as write
    write(theirs.state_dict(), tmp_path / file)

    ours = make(nnx.Rngs(0), dtype)
    load(ours, tmp_path / file, rename=rename)

    # Unchanged, PyTorch has it back bit for bit.
    save(ours, tmp_path / f"back.{file}", rename=rename)
    back = read(tmp_path / f"back.{file}")
    assert back.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))

    def assert_alike(tree, tensors, factor=1):
        for path, variable in nnx.to_flat_state(tree):
            name = rename(".".join(map(str, path)))
            tensor = wide(tensors[name].detach().double().numpy())
            error = relative_error(variable.get_value(), tensor)
            # The keys' part of this bias has no gradient but rounding.
            assert (
                error <= factor * TOLERANCE[dtype] or name == "self_attn.in_proj_bias"
            )

    x = random_array(5, (3, 7, theirs_width(theirs)), dtype)
    inputs = torch.from_numpy(np.array(x, "float32")).to(getattr(torch, dtype))
    target = random_array(6, tuple(theirs(inputs).shape), "float32")
    wanted = torch.from_numpy(np.array(target))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)

    def loss(model):
        y = model(x).astype("float32")
        return jnp.mean((y - target) ** 2), y

    for step in range(3):
        optimizer.zero_grad()
        expected = theirs(inputs).float()
        ((expected - wanted) ** 2).mean().backward()
        gradients, y = nnx.grad(loss, has_aux=True)(ours)
        if step == 0:
            expected = wide(expected.detach().numpy())
            assert relative_error(y, expected) <= TOLERANCE[dtype]
            tensors = {name: p.grad for name, p in theirs.named_parameters()}
            assert_alike(gradients, tensors, factor=5)
        optimizer.step()
        state = nnx.state(ours)
        nnx.update(ours, jax.tree.map(descended, state, gradients))
    assert_alike(nnx.state(ours), theirs.state_dict())
    # Trained, it is PyTorch's again.
    save(ours, tmp_path / file, rename=rename)
    theirs.load_state_dict(read(tmp_path / file))
    expected = wide(theirs(inputs).detach().float().numpy())
    assert relative_error(loss(ours)[1], expected) <= TOLERANCE[dtype]


def descended(parameter, gradient):
    return parameter - jnp.asarray(0.1, parameter.dtype) * gradient


def theirs_width(module):
    return 12 if isinstance(module, torch.nn.Sequential) else 16


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"],
)
@pytest.mark.parametrize(
    "file", ["a.pt", "a.safetensors", "a.safetensors.index.json", None]
)
def test_every_dtype_goes_to_pytorch_and_back_bit_for_bit(dtype, file, tmp_path):
    tensor = torch.randint(0, 256, (6, 8 * 8), dtype=torch.uint8).view(
        getattr(torch, dtype)
    )
    # Not contiguous, as a slice of a fused projection is not.
    state = {"weight": tensor.T, "scalar": tensor[0, 0]}
    with jax.enable_x64(True):
        target = {n: jnp.zeros(t.shape, dtype) for n, t in state.items()}
        loaded = load(target, state)
        if file:
            save(loaded, tmp_path / file)
            loaded = load(target, tmp_path / file)
            if file != "a.safetensors.index.json":
                from safetensors.torch import load_file

                back = (torch.load if file == "a.pt" else load_file)(tmp_path / file)
                bits = {
                    n: t.contiguous().reshape(-1).view(torch.uint8)
                    for n, t in back.items()
                }
                for name, t in state.items():
                    assert torch.equal(
                        bits[name], t.contiguous().reshape(-1).view(torch.uint8)
                    )
        for name, t in state.items():
            raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert np.asarray(loaded[name]).tobytes() == raw


def test_a_file_of_pytorch_is_read_when_it_is_needed_and_unpickles_nothing(tmp_path):
    torch.save({"model": {"weight": torch.ones(3)}}, tmp_path / "nested.pt")
    with pytest.raises(
        TypeError, match=r"got dict at 'model' \(is the state dict inside"
    ):
        load({"weight": jnp.ones(3)}, tmp_path / "nested.pt")
    torch.save({"weight": functools.partial(print)}, tmp_path / "code.pt")
    with pytest.raises(
        ValueError, match=r"^`source` must be a state dict that PyTorch can"
    ):
        load({"weight": jnp.ones(3)}, tmp_path / "code.pt")
    sparse = {"weight": torch.eye(3).to_sparse()}
    with pytest.raises(
        TypeError, match=r"^`source` must have dense tensors with values"
    ):
        load({"weight": jnp.ones((3, 3))}, sparse)


class ConvNet(nnx.Module):
    """Each kind of layer that PyTorch and Flax have alike."""

    def __init__(self, rngs):
        def norm(kind, size, **options):
            return kind(size, epsilon=1e-5, rngs=rngs, **options)

        self.conv = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.bn = norm(nnx.BatchNorm, 8, use_running_average=True)
        # A square one in groups: every axis but the last is 3 or 8.
        self.depthwise = nnx.Conv(
            8, 8, (3, 3), padding=1, feature_group_count=8, rngs=rngs
        )
        self.gn = norm(nnx.GroupNorm, 8, num_groups=2)
        self.up = Linear(8, 8, rngs=rngs)
        self.rms = norm(nnx.RMSNorm, 8)
        self.flax = nnx.Linear(8, 8, rngs=rngs)
        self.ln = norm(nnx.LayerNorm, 8)
        self.down = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):  # (rows, height, width, 3)
        x = nnx.relu(self.bn(self.conv(x)))
        x = self.gn(self.depthwise(x)).mean((1, 2))
        x = self.ln(self.flax(self.rms(self.up(x))))
        return self.down(x)


class TheirConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gn = torch.nn.GroupNorm(2, 8)
        self.up, self.flax = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.rms, self.ln = torch.nn.RMSNorm(8, eps=1e-5), torch.nn.LayerNorm(8)
        self.down = torch.nn.Linear(8, 5)

    def forward(self, x):  # (rows, 3, height, width)
        x = torch.relu(self.bn(self.conv(x)))
        x = self.gn(self.depthwise(x)).mean((2, 3))
        return self.down(self.ln(self.flax(self.rms(self.up(x)))))


def trained_a_little(module):
    """With no parameter at the value that it started with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_norms_and_convolutions_of_flax_are_those_of_pytorch(file, tmp_path):
    theirs = trained_a_little(TheirConvNet())
    theirs(torch.randn(7, 3, 6, 5))  # Some statistics.
    state = theirs.eval().state_dict()
    ours = ConvNet(nnx.Rngs(0))
    assert load(ours, state) == LeftOut()
    x = random_array(5, (2, 6, 5, 3), "float32")
    expected = theirs(torch.from_numpy(np.moveaxis(np.array(x), -1, 1)))
    assert relative_error(ours(x), wide(expected.detach().numpy())) <= 1e-5
    save(ours, tmp_path / file)
    if file == "model.pt":
        back = torch.load(tmp_path / file)
    else:
        from safetensors.torch import load_file

        back = load_file(tmp_path / file)
    assert state.keys() - back.keys() == {"bn.num_batches_tracked"}
    assert all(torch.equal(state[name], tensor) for name, tensor in back.items())
    TheirConvNet().load_state_dict(back)  # Strictly: PyTorch starts the counter itself.


def test_a_tied_head_is_written_under_both_names(tmp_path):
    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = torch.nn.Embedding(7, 4)
            self.lm_head = torch.nn.Linear(4, 7, bias=False)
            self.lm_head.weight = self.wte.weight

    theirs = Theirs()
    ours = nnx.Dict(wte=nnx.Embed(7, 4, rngs=nnx.Rngs(0)))
    rename = {"wte.embedding": ("wte.weight", "lm_head.weight")}
    load(ours, theirs.state_dict(), rename=rename)
    save(ours, tmp_path / "model.pt", rename=rename)
    (other := Theirs()).load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(other.lm_head.weight, theirs.wte.weight)


def test_an_index_of_files_of_pytorch_is_read(tmp_path):
    state = TheirConvNet().state_dict()
    where = {}
    for number, name in enumerate(state):
        where[name] = f"pytorch_model-{number % 3}.bin"
    for file in {*where.values()}:
        torch.save({n: state[n] for n in where if where[n] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    load(ours := ConvNet(nnx.Rngs(0)), index)
    expected = ConvNet(nnx.Rngs(1))
    load(expected, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, *map(nnx.state, (ours, expected))))
    index.write_text(json.dumps({"weight_map": where | {"x": where["bn.weight"]}}))
    with pytest.raises(ValueError, match=r"^`source` must be an index .* tensor 'x'$"):
        load(ours, index)
    with pytest.raises(ValueError, match=r"^`path` must end in"):
        save(ours, index)


def test_a_checkpoint_of_lightning_is_read(tmp_path):
    state = {f"model.{n}": t for n, t in TheirConvNet().state_dict().items()}
    file = {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {}}]}
    torch.save(file, tmp_path / "last.ckpt")
    assert load(ConvNet(nnx.Rngs(0)), tmp_path / "last.ckpt", prefix="model.") == (
        LeftOut()
    )
    with pytest.raises(ValueError, match=r"^`path` must end in"):
        save(ConvNet(nnx.Rngs(0)), tmp_path / "mine.ckpt")


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_state_of_fsdp_is_refused_with_what_to_pass(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = torch.nn.Linear(3, 4)
    weight = layer.weight.detach().numpy().copy()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    state = layer.state_dict()
    torch.save(state, tmp_path / "state.pt")
    ours = Linear(3, 4, rngs=nnx.Rngs(0))
    before = np.array(ours.weight[...])
    for source in state, tmp_path / "state.pt":
        with pytest.raises(
            TypeError, match=r"got DTensor at 'weight': pass its `full_tensor\(\)`"
        ):
            load(ours, source)
        assert np.array_equal(ours.weight[...], before)
    load(ours, {name: tensor.full_tensor() for name, tensor in state.items()})
    assert np.array_equal(ours.weight[...], weight)


@pytest.mark.usefixtures("process_group")
def test_wrapped_modules_of_pytorch_get_a_hint():
    layer = torch.nn.Linear(3, 4)
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    compile = functools.partial(torch.compile, backend="eager")
    inside = torch.nn.Sequential(compile(layer))
    hints = {
        "with `prefix='module.'`": parallel,
        "with `prefix='_orig_mod.'`": compile(layer),
        "with `prefix='_orig_mod.module.'`": compile(parallel),
        "with `prefix='0._orig_mod.'`": inside,
    }
    for hint, module in hints.items():
        with pytest.raises(ValueError, match=rf"2 of 2 parameters are found {hint}$"):
            load(Linear(3, 4, rngs=nnx.Rngs(0)), module.state_dict())
    ours = nnx.Sequential(Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"found without _orig_mod. in the names"):
        load(ours, inside.state_dict(), rename={"layers": ""})


def test_tensors_without_values_are_refused_by_name():
    with torch.device("meta"):
        meta = torch.ones(3)
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(3)
    lazy = torch.nn.LazyLinear(3).weight
    for tensor in meta, fake, lazy, torch.nn.Parameter(meta):
        with pytest.raises(
            TypeError, match=r"^`source` must have dense tensors .* 'weight'"
        ):
            load({"weight": jnp.ones(3)}, {"weight": tensor})

    # A subclass that only adds methods has values.
    class Named(torch.Tensor):
        pass

    state = {"weight": torch.full((3,), 2.0).as_subclass(Named)}
    assert float(load({"weight": jnp.ones(3)}, state)["weight"][0]) == 2


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_a_file_of_pytorch_that_cannot_be_written_is_an_os_error(ending, tmp_path):
    import resource

    source = {"x": np.ones(30_000, "float32")}
    path = tmp_path / "missing" / f"model.{ending}"
    with pytest.raises(FileNotFoundError) as error:
        save(source, path)
    assert error.value.filename == str(path)
    (folder := tmp_path / f"folder.{ending}").mkdir()
    with pytest.raises(IsADirectoryError):
        save(source, folder)
    folder.rmdir()
    save({"x": np.ones(3, "float32")}, path := tmp_path / f"model.{ending}")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save(source, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    with pytest.raises(ValueError, match=r"^`source` must have dtypes .* int4 at 'x'$"):
        save({"x": np.ones(3, jnp.int4)}, path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_of_pytorch_has_the_mode_of_the_umask_or_of_the_old_file(tmp_path):
    path, old = tmp_path / "model.pt", os.umask(0o027)
    try:
        save({"x": np.ones(3)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        save({"x": np.ones(3)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(old)
