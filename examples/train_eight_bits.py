"""Train in 8 bits: the same losses as in bfloat16, from the same seeds.

    python examples/train_eight_bits.py [--steps N]

Two models learn the 8 x 8 scans of digits that come with scikit-learn: a network of
three layers, and a transformer block that reads each image as eight tokens of eight
pixels. All their linear layers are ours. Each is trained from three seeds with products
in bfloat16, in float8 and in int8; parameters are float32, and the recipe is the one
argument that differs. The losses, over the last tenth of the steps and on images that
were held out, must be those of bfloat16 to within MARGIN, and are drawn in a PNG.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxlinear
from jaxlinear.nnx import Linear

RECIPES = {"bfloat16": None, "float8": jaxlinear.FLOAT8, "int8": jaxlinear.INT8}
SEEDS = 0, 1, 2
BATCH, WIDTH, CLASSES, SIDE, HEADS = 128, 64, 10, 8, 4
HELD_OUT = 360
MARGIN = 0.02  # nats


class Network(nnx.Module):
    def __init__(self, rngs, **options):
        sizes = SIDE * SIDE, 4 * WIDTH, 4 * WIDTH, CLASSES
        self.layers = nnx.List(
            Linear(*pair, rngs=rngs, **options) for pair in itertools.pairwise(sizes)
        )

    def __call__(self, images):
        *hidden, head = self.layers
        x = images.reshape(len(images), -1)
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return head(x)


class Transformer(nnx.Module):
    """A block of attention and two layers, each behind a norm and beside a shortcut."""

    def __init__(self, rngs, **options):
        def linear(in_features, out_features):
            return Linear(in_features, out_features, rngs=rngs, **options)

        self.embedding = linear(SIDE, WIDTH)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs(), (SIDE, WIDTH)))
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.head = linear(WIDTH, CLASSES)

    def __call__(self, images):
        x = self.embedding(images) + self.position[...]
        qkv = self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 3, HEADS, -1)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + self.out(attended.reshape(x.shape))
        x = x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


MODELS = {"network": Network, "transformer block": Transformer}


@functools.cache  # One object for all seeds, for which a step is then compiled once.
def adamw(steps):
    return optax.adamw(optax.cosine_decay_schedule(2e-3, steps))


def mean_loss(model, images, labels):
    logits = model(images).astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, gradients = nnx.value_and_grad(mean_loss)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


def train(make_model, products, seed, steps):
    """The loss of each step, and that of the images held out."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    images = (images[order] / 16).astype("float32").reshape(-1, SIDE, SIDE)
    labels = labels[order]
    model = make_model(nnx.Rngs(seed), dtype="bfloat16", products=products)
    optimizer = nnx.Optimizer(model, adamw(steps), wrt=nnx.Param)
    losses = []
    for _ in range(steps):
        batch = generator.integers(HELD_OUT, len(images), BATCH)
        losses.append(train_step(model, optimizer, images[batch], labels[batch]))
    held_out = mean_loss(model, images[:HELD_OUT], labels[:HELD_OUT])
    return np.array(losses), float(held_out)


def draw(curves, file):
    """The losses of each model, smoothed, with one line for each seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, 2), MODELS, strict=True):
        for k, recipe in enumerate(RECIPES):
            for seed in SEEDS:
                losses, _ = curves[model, recipe, seed]
                window = max(1, len(losses) // 20)
                smooth = np.convolve(losses, np.ones(window) / window, "valid")
                label = recipe if seed == SEEDS[0] else None
                axes.plot(smooth, color=f"C{k}", lw=1, label=label)
        axes.set(title=model, xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description="Train in 8 bits: the same losses as in bfloat16."
    )
    parser.add_argument("--steps", type=int, default=400, help="default: 400")
    steps = parser.parse_args().steps
    if steps < 10:
        parser.error(f"argument --steps: must be at least 10, got {steps}")
    runs = [(m, r, s) for m in MODELS for r in RECIPES for s in SEEDS]
    console = Console()
    curves = {
        (model, recipe, seed): train(MODELS[model], RECIPES[recipe], seed, steps)
        for model, recipe, seed in track(runs, "training", console=console)
    }
    table = Table("model", "products", "seed", "training loss", "held-out loss")
    worst = 0.0
    for (model, recipe, seed), (losses, held_out) in curves.items():
        last = losses[-steps // 10 :].mean()
        table.add_row(model, recipe, str(seed), f"{last:.4f}", f"{held_out:.4f}")
        reference, of_held_out = curves[model, "bfloat16", seed]
        less = reference[-steps // 10 :].mean()
        worst = max(worst, float(last - less), held_out - of_held_out)
    console.print(table)
    file = Path("eight-bits.png")
    draw(curves, file)
    console.print(f"written: {file}")
    console.print(f"at most {worst:.4f} above bfloat16's loss; the margin is {MARGIN}")
    return int(not worst <= MARGIN)


if __name__ == "__main__":
    sys.exit(main())
