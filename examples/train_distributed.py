"""Train a small language model in several processes, with checkpoints.

    python examples/launch.py 2 examples/train_distributed.py --sharding fsdp

trains in two processes. On a TPU pod, or a cluster that JAX detects, start it on every
host. A stopped or killed run can be continued, with any number of processes.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import track

import jaxlinear

WIDTH, LENGTH, ROWS, FOLDER = 64, 64, 32, Path("train_distributed").absolute()


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss(model):
        h = nnx.Sequential(*model.layers[:-1])(tokens[:, :-1])
        return model.layers[-1].cross_entropy(h, tokens[:, 1:])

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(sharding, steps):
    tokens = np.frombuffer("".join(topics.values()).encode(), "uint8")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), ("data",)))

    def make():
        rngs = nnx.Rngs(0)
        embed = nnx.Embed(256, WIDTH, rngs=rngs)  # Its gradients are summed in float32.
        layers = Block(rngs), Block(rngs), nnx.Linear(WIDTH, 256, rngs=rngs)
        jaxlinear.nnx.convert(model := nnx.Sequential(embed, *layers))
        return model, nnx.Optimizer(model, optax.sgd(0.05, 0.9), wrt=nnx.Param)

    def placed(leaf):
        is_split = leaf.ndim and leaf.shape[0] % jax.device_count() == 0
        return split if sharding == "fsdp" and is_split else whole

    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = jax.tree.map(placed, abstract)
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings)()

    def batch(step):
        starts = np.random.default_rng(step).integers(len(tokens) - LENGTH, size=ROWS)
        places = starts[:, None] + np.arange(LENGTH + 1)
        read = lambda rows: tokens[places[rows]]  # noqa: E731 (only local rows)
        return jax.make_array_from_callback(places.shape, split, read)

    options = ocp.CheckpointManagerOptions(max(1, steps // 10), max_to_keep=2)
    with ocp.CheckpointManager(FOLDER, options=options) as manager:
        if done := manager.latest_step() or 0:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        model, optimizer = nnx.merge(graph, state)
        is_first = jax.process_index() == 0
        for step in track(range(done + 1, steps + 1), disable=not is_first):
            loss = train_step(model, optimizer, batch(step))
            state = ocp.args.StandardSave(nnx.state((model, optimizer)))
            if manager.save(step, args=state, force=step == steps) and is_first:
                print(f"step {step}: loss {loss:.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sharding", choices=["data", "fsdp"], default="fsdp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--launched", nargs=2, type=int, default=(None, None))
    options = parser.parse_args()
    jax.distributed.initialize(None, *options.launched)
    train(options.sharding, options.steps)


if __name__ == "__main__":
    main()
