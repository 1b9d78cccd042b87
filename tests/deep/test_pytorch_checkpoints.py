"""Checkpoints that PyTorch wrote, trained here and given back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import random_array, relative_error, wide

from jaxlinear.nnx import Linear
from jaxlinear.torch import load, save

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
