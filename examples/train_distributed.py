"""Train a small language model over several processes, from checkpoint to checkpoint.

    python examples/train_distributed.py --processes 2 --sharding fsdp

starts two on this machine, which listen on its loopback. On a TPU pod, or a cluster
that JAX knows, start it on every host without ``--processes``. Stopped or killed, it
goes on from its last checkpoint, with any number of processes.
"""

import argparse
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import track

from jaxlinear.nnx import Linear

WIDTH, HEADS, LAYERS, LENGTH, ROWS = 64, 4, 2, 64, 32


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv = Linear(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=rngs)
        self.out = Linear((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1), rngs=rngs)
        self.up = Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)), -3, 0)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = Linear(WIDTH, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss(model):
        logits, wanted = model(tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(options):
    # The descriptions of scikit-learn's data sets, by character.
    pages = sorted(files("sklearn.datasets.descr").iterdir(), key=str)
    text = "".join(page.read_text() for page in pages if page.name.endswith("rst"))
    vocabulary, tokens = np.unique(list(text), return_inverse=True)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), ("data",)))

    def placed(leaf):
        is_split = leaf.ndim and leaf.shape[0] % jax.device_count() == 0
        return split if options.sharding == "fsdp" and is_split else whole

    def make():
        model = Model(len(vocabulary), nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = jax.tree.map(placed, abstract)
    state = jax.jit(lambda: nnx.split(make())[1], out_shardings=shardings)()

    def batch(step):
        starts = np.random.default_rng(step).integers(len(tokens) - LENGTH, size=ROWS)
        windows = starts[:, None] + np.arange(LENGTH + 1)
        # A process reads the rows of its own devices.
        return jax.make_array_from_callback(
            windows.shape, split, lambda rows: tokens[windows[rows]].astype("int32")
        )

    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(options.folder.absolute(), options=keep) as manager:
        done = manager.latest_step() or 0
        if done:
            restore = ocp.args.StandardRestore(state)
            state = manager.restore(done, args=restore)
        model, optimizer = nnx.merge(graph, state)
        is_first = jax.process_index() == 0
        for step in track(range(done, options.steps), disable=not is_first):
            loss = train_step(model, optimizer, batch(step))
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                state = nnx.state((model, optimizer))
                manager.save(step + 1, args=ocp.args.StandardSave(state))
                if is_first:
                    print(f"step {step + 1}: loss {loss:.4f}", flush=True)


def launch(options):
    """Start the processes here; where one ends badly, end the others."""
    # JAX's collectives listen at the address of this host's name.
    listening = socket.gethostbyname(socket.gethostname())
    if not (options.listen or listening.startswith("127.")):
        sys.exit(
            f"The processes would listen at {listening}: pass --listen to let them."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--address", address, "--rank"]
    ranks = [subprocess.Popen([*command, str(i)]) for i in range(options.processes)]
    try:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
            for i, rank in enumerate(ranks):
                if rank.returncode:
                    sys.exit(
                        f"Process {i} ended with {rank.returncode}, so the others are"
                        " ended. Start it again to go on from the last checkpoint."
                    )
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, help="how many to start here")
    parser.add_argument("--sharding", choices=["data", "fsdp"], default="fsdp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps to a checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("train_distributed"))
    parser.add_argument("--listen", action="store_true", help="not on loopback alone")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.processes and options.rank is None:
        launch(options)
        return
    if options.processes:
        jax.distributed.initialize(
            options.address,
            options.processes,
            options.rank,
            coordinator_bind_address=options.address,
            heartbeat_timeout_seconds=10,
        )
    else:
        jax.distributed.initialize()
    train(options)


if __name__ == "__main__":
    main()
