"""Fine-tune with low-rank adapters (LoRA) in one layer, and everything else frozen.

    python examples/finetune_lora.py

A network learns upright digits. Then the digits are turned by 90 degrees, and only two
thin weights beside the first layer are trained. A frozen weight has no gradient, so the
input of its layer is not kept for the backward pass. ``explain`` counts the bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlinear
from jaxlinear.nnx import Linear

STEPS, BATCH, RANK, WIDTH = 500, 64, 8, 512


class Adapter(nnx.Variable):
    """A weight that is fine-tuned."""


class AdaptedLinear(nnx.Module):
    """Y = X Wᵀ + B + (X Aᵀ) Cᵀ with A (rank, in) and C (out, rank), at first zero."""

    def __init__(self, layer: Linear, rngs: nnx.Rngs):
        self.layer = layer
        out_features, in_features = layer.weight.shape
        self.A = Adapter(0.1 * rngs.params.normal((RANK, in_features)))
        self.C = Adapter(jnp.zeros((out_features, RANK)))

    def __call__(self, x):
        thin = jaxlinear.linear(x, self.A[...], dtype=jnp.bfloat16)
        added = jaxlinear.linear(thin, self.C[...], dtype=jnp.bfloat16)
        return self.layer(x) + added


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        mixed = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.hidden1 = AdaptedLinear(Linear(64, WIDTH, **mixed), rngs)
        self.hidden2 = Linear(WIDTH, WIDTH, **mixed)
        self.head = Linear(WIDTH, 10, **mixed)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x))
        return self.head(nnx.relu(self.hidden2(x))).astype(jnp.float32)


def train(model, trained, images, labels, title):
    """Train the variables of the type ``trained``; the others are frozen."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=trained)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(model(images), labels).mean()

        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, gradients)

    draws = np.random.default_rng(0)
    for _ in track(range(STEPS), title):
        batch = draws.integers(len(images), size=BATCH)
        step(model, optimizer, images[batch], labels[batch])


def main():
    scans, digits = load_digits(return_X_y=True)
    scans, digits = np.float32(scans / 16), np.int32(digits)
    rotated = np.rot90(scans.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    split = train_test_split(scans, rotated, digits, random_state=0)
    upright, _, turned, test, labels, test_labels = split
    model = Classifier(nnx.Rngs(0))
    train(model, nnx.Param, upright, labels, "all weights")
    before = jnp.mean(model(test).argmax(1) == test_labels)
    train(model, Adapter, turned, labels, "adapters   ")
    after = jnp.mean(model(test).argmax(1) == test_labels)
    print(f"turned digits: {before:.1%} right before, {after:.1%} after")

    for title, trained in {"all weights": nnx.Param, "adapters": Adapter}.items():
        graph, some, frozen = nnx.split(model, trained, ...)
        size = sum(a.size for a in jax.tree.leaves(some))
        forward = lambda some: nnx.merge(graph, some, frozen)(turned)  # noqa: B023, E731
        kept = jaxlinear.explain(forward, some).saved_bytes
        print(f"{title}: {size:,} parameters, {kept:,} bytes for the backward pass")


if __name__ == "__main__":
    main()
