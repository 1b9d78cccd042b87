"""Training with our layer goes on from a checkpoint of Orbax's as if never stopped."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxlinear.linen
import jaxlinear.nnx

BATCHES = np.random.default_rng(0).normal(size=(4, 16, 8)).astype("float32")
ADAM = optax.adam(1e-2)


@pytest.fixture(autouse=True)
def _ordinary_promotion():
    """Optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class NnxModel(nnx.Module):
    def __init__(self, hidden):
        rngs = nnx.Rngs(0)
        self.up = jaxlinear.nnx.Linear(8, hidden, dtype="bfloat16", rngs=rngs)
        self.down = jaxlinear.nnx.Linear(hidden, 8, dtype="bfloat16", rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x))).astype("float32")


class LinenModel(linen.Module):
    hidden: int

    @linen.compact
    def __call__(self, x):
        x = linen.relu(jaxlinear.linen.Linear(self.hidden, dtype="bfloat16")(x))
        return jaxlinear.linen.Linear(8, dtype="bfloat16")(x).astype("float32")


def in_nnx(hidden=32):
    """The state at the start, and a function of a state and a batch to the next one."""
    model = NnxModel(hidden)
    graph, state = nnx.split((model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)))

    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        gradients = nnx.grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer))

    return state, jax.jit(step)


def in_linen(hidden=32):
    model = LinenModel(hidden)
    params = model.init(jax.random.key(0), BATCHES[0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ADAM)

    def step(state, x):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - x) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    return state, jax.jit(step)


@pytest.fixture(params=[in_nnx, in_linen])
def make(request):
    return request.param


def after(step, state, batches):
    for x in batches:
        state = step(state, x)
    return state


@pytest.fixture
def checkpointer():
    with ocp.StandardCheckpointer() as checkpointer:
        yield checkpointer


@pytest.fixture
def saved(make, tmp_path, checkpointer):
    """The folder of a checkpoint after two steps."""
    state, step = make()
    checkpointer.save(tmp_path / "saved", after(step, state, BATCHES[:2]))
    checkpointer.wait_until_finished()
    return tmp_path / "saved"


def test_resumed_training_is_the_undisturbed_one_bit_for_bit(make, saved, checkpointer):
    state, step = make()
    undisturbed = jax.tree.leaves(after(step, state, BATCHES))
    resumed = after(step, checkpointer.restore(saved, state), BATCHES[2:])
    assert len(undisturbed) > 12  # Four parameters, each with two moments in Adam.
    for a, b in zip(undisturbed, jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def refusal(folder, make, hidden=32):
    """What a program prints that restores a checkpoint, and fails.

    A program of its own: after what fails, threads of Orbax go on to complain.
    """
    program = (
        "import sys, orbax.checkpoint as ocp, test_checkpoints\n"
        "_, folder, make, hidden = sys.argv\n"
        "state, _ = getattr(test_checkpoints, make)(int(hidden))\n"
        "ocp.StandardCheckpointer().restore(folder, state)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, folder, make.__name__, str(hidden)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    return result.stderr


def test_checkpoint_of_another_width_is_refused(make, saved):
    printed = refusal(saved, make, hidden=16)
    assert "is not compatible with the stored shape" in printed


def test_damaged_checkpoint_is_refused(make, saved):
    for file in saved.rglob("d/*"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    printed = refusal(saved, make)
    assert "DATA_LOSS" in printed or "OUT_OF_RANGE" in printed
