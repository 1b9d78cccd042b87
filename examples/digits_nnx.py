"""Train a classifier of handwritten digits in mixed precision, with Flax NNX.

    python examples/digits_nnx.py [folder for checkpoints]

Parameters are float32, products bfloat16. It trains two models from one start, with our
layer and with Flax's. It prints and draws (``digits_nnx.png``) what both learn and the
errors of a weight gradient. With a folder for checkpoints, a stopped run continues.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlinear
from jaxlinear.nnx import Linear

EPOCHS, BATCH = 30, 32


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        mixed = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.hidden1 = Linear(64, 256, **mixed)
        self.hidden2 = Linear(256, 256, **mixed)
        self.head = Linear(256, 10, **mixed)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x))
        return self.head(nnx.relu(self.hidden2(x))).astype(jnp.float32)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(model(images), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def weight_gradient_errors(ours, flax, X):
    """Of both layers against float64, for a random cotangent G of Y."""
    G = jax.random.normal(jax.random.key(0), ours(X).shape, jnp.bfloat16)
    ours = nnx.grad(lambda layer: (layer(X) * G).sum())(ours).weight[...]
    flax = nnx.grad(lambda layer: (layer(X) * G).sum())(flax).kernel[...].T
    exact = np.asarray(G, np.float64).T @ np.asarray(X, np.float64)
    return [np.linalg.norm(w - exact) / np.linalg.norm(exact) for w in (ours, flax)]


def main(folder: Path | None = None):
    scans, digits = load_digits(return_X_y=True)
    data = np.float32(scans / 16), np.int32(digits)
    images, test, labels, test_labels = train_test_split(*data, random_state=0)
    batches = len(images) // BATCH
    rate = optax.cosine_decay_schedule(2e-3, EPOCHS * batches)
    models = [model := Classifier(nnx.Rngs(0)), nnx.clone(model)]
    jaxlinear.nnx.revert(models[1])
    trained = [(m, nnx.Optimizer(m, optax.adamw(rate), wrt=nnx.Param)) for m in models]
    manager = ocp.CheckpointManager(folder.absolute()) if folder else None
    done = (manager.latest_step() if manager else None) or 0
    if manager and done:
        saved = ocp.args.StandardRestore(nnx.state(trained))
        nnx.update(trained, manager.restore(done, args=saved))
    losses = []
    for epoch in track(range(done, EPOCHS), "training"):
        order = np.random.default_rng(epoch).permutation(batches * BATCH)
        for i in order.reshape(batches, BATCH):
            losses.append([train_step(*m, images[i], labels[i]) for m in trained])
        if manager:
            manager.save(epoch + 1, args=ocp.args.StandardSave(nnx.state(trained)))
            manager.wait_until_finished()
    ours, flax = (jnp.mean(m(test).argmax(1) == test_labels) for m in models)
    print(f"held-out accuracy: {ours:.2%}, with Flax's layer {flax:.2%}")
    X = nnx.relu(model.hidden1(jnp.asarray(images)))
    ours, flax = weight_gradient_errors(model.hidden2, models[1].hidden2, X)
    print(f"error of a weight gradient: {ours:.1e}, with Flax's layer {flax:.1e}")
    left, right = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    left.legend(left.semilogy(losses, alpha=0.7), ["jaxlinear", "nnx.Linear"])
    left.set(title="loss", xlabel="step")
    right.bar(["jaxlinear", "nnx.Linear"], [ours, flax])
    right.set(title="error of a weight gradient", yscale="log", ylim=(1e-8, 1))
    figure.savefig("digits_nnx.png", dpi=120)
    print("written: digits_nnx.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
