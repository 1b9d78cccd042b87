"""Train in 8 bits and in bfloat16 from the same seeds: the losses are close.

    python examples/train_eight_bits.py [--steps N]

A transformer block learns scikit-learn's 8 x 8 scans of digits, each read as eight
tokens of eight pixels. It trains from three seeds with products in bfloat16, float8 and
int8. Parameters are float32; only ``products=`` differs. ``eight-bits.png`` shows the
losses.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits

import jaxlinear
from jaxlinear.nnx import Linear

RECIPES = {"bfloat16": None, "float8": jaxlinear.FLOAT8, "int8": jaxlinear.INT8}
COLORS, SEEDS = {"bfloat16": "C0", "float8": "C1", "int8": "C2"}, range(3)
WIDTH, HEADS, BATCH, HELD_OUT = 64, 4, 128, 360


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, products):
        options = {"dtype": jnp.bfloat16, "products": products, "rngs": rngs}
        linear = functools.partial(Linear, **options)
        self.embedding = linear(8, WIDTH)
        self.position = nnx.Param(0.1 * rngs.params.normal((8, WIDTH)))
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
        self.qkv = linear(WIDTH, (3, HEADS, WIDTH // HEADS))
        self.out = linear((HEADS, WIDTH // HEADS), WIDTH, axis=(-2, -1))
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.head = linear(WIDTH, 10)

    def __call__(self, images):
        x = self.embedding(images) + self.position
        q, k, v = jnp.moveaxis(self.qkv(self.norms[0](x)), -3, 0)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1)).astype(jnp.float32)


def mean_loss(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, gradients = nnx.value_and_grad(mean_loss)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


def train(products, seed, tx, steps):
    """The loss of each step, and the loss on the held-out images."""
    scans, digits = load_digits(return_X_y=True)
    draws = np.random.default_rng(seed)
    order = draws.permutation(len(scans))
    images, labels = np.float32(scans[order] / 16).reshape(-1, 8, 8), digits[order]
    model = Transformer(nnx.Rngs(seed), products)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for _ in range(steps):
        batch = draws.integers(HELD_OUT, len(images), BATCH)
        losses.append(train_step(model, optimizer, images[batch], labels[batch]))
    held_out = mean_loss(model, images[:HELD_OUT], labels[:HELD_OUT])
    return np.array(losses), float(held_out)


def main():
    parser = argparse.ArgumentParser(description="Train in 8 bits.")
    parser.add_argument("--steps", type=int, default=400, help="default: 400")
    if (steps := parser.parse_args().steps) < 10:
        parser.error(f"argument --steps: must be at least 10, got {steps}")
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps))
    axes = (figure := Figure()).subplots()
    for recipe, seed in track([(r, s) for r in RECIPES for s in SEEDS], "training"):
        losses, held_out = train(RECIPES[recipe], seed, tx, steps)
        last = losses[-steps // 10 :].mean()
        print(f"{recipe}, seed {seed}: loss {last:.4f}, held-out loss {held_out:.4f}")
        smooth, color = np.convolve(losses, np.ones(9) / 9, "valid"), COLORS[recipe]
        axes.semilogy(smooth, color, label=recipe if seed == 0 else None)
    axes.legend()
    axes.set(xlabel="step", ylabel="loss")
    figure.savefig("eight-bits.png", dpi=120)
    print("written: eight-bits.png")


if __name__ == "__main__":
    main()
