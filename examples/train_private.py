"""Train a classifier of handwritten digits with differential privacy, with Flax NNX.

    pip install dp-accounting && python examples/train_private.py

Each batch is a Poisson sample of the examples. Their gradients are clipped one by one,
without being computed one by one, and noise is added. The accountant says which (ε, δ)
that is. Beside it the same model is trained without clipping and noise.
"""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlinear
from jaxlinear.nnx import Linear

STEPS, EXPECTED, LARGEST = 200, 256, 384  # The examples of a batch.
CLIP_NORM, NOISE, DELTA = 0.5, 3.0, 1e-5


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = Linear(64, 128, rngs=rngs)
        self.head = Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


graph, initial = nnx.split(Classifier(nnx.Rngs(0)))
optimizer = optax.adam(1e-2)


def loss(parameters, images, labels):
    logits = nnx.merge(graph, parameters)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_gradient(bound, noise):
    """The mean gradient, clipped to a norm, with this much noise."""
    clipped = jaxlinear.clipped_grad(loss, l2_clip_norm=bound, batch_argnums=(1, 2))

    def gradient(parameters, images, labels, is_padding, key):
        total = clipped(parameters, images, labels, is_padding_example=is_padding)
        leaves, tree = jax.tree.flatten(total)
        keys = tree.unflatten(jax.random.split(key, len(leaves)))

        def noisy_mean(total, key):
            return (total + noise * jax.random.normal(key, total.shape)) / EXPECTED

        return jax.tree.map(noisy_mean, total, keys)

    return gradient


def train(gradient, images, labels):
    @jax.jit
    def step(parameters, state, *batch):
        updates, state = optimizer.update(gradient(parameters, *batch), state)
        return optax.apply_updates(parameters, updates), state

    parameters, state = initial, optimizer.init(initial)
    generator = np.random.default_rng(0)
    for number in range(STEPS):
        (chosen,) = np.nonzero(generator.random(len(images)) < EXPECTED / len(images))
        is_padding = np.arange(LARGEST) >= len(chosen)
        chosen = np.resize(chosen, LARGEST)
        batch = images[chosen], labels[chosen], is_padding, jax.random.key(number)
        parameters, state = step(parameters, state, *batch)
    return parameters


def epsilon(examples):
    """What DP-SGD with these batches and this noise is worth, at ``DELTA``."""
    accountant = dp_accounting.pld.PLDAccountant()
    noisy = dp_accounting.GaussianDpEvent(NOISE)
    sampled = dp_accounting.PoissonSampledDpEvent(EXPECTED / examples, noisy)
    return accountant.compose(sampled, STEPS).get_epsilon(DELTA)


def main():
    scans, digits = load_digits(return_X_y=True)
    data = np.float32(scans / 16), np.int32(digits)
    images, test, labels, test_labels = train_test_split(*data, random_state=0)
    print(f"ε = {epsilon(len(images)):.1f} at δ = {DELTA}")
    kinds = {"private": (CLIP_NORM, NOISE * CLIP_NORM), "not private": (jnp.inf, 0.0)}
    for name, kind in kinds.items():
        parameters = train(mean_gradient(*kind), images, labels)
        found = nnx.merge(graph, parameters)(test).argmax(1)
        print(f"held-out accuracy, {name}: {jnp.mean(found == test_labels):.2%}")


if __name__ == "__main__":
    main()
