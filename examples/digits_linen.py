"""Train a classifier of handwritten digits in mixed precision, with Flax Linen.

    python examples/digits_linen.py

The 1797 scans of 8 x 8 pixels come with scikit-learn. Parameters are float32, products
bfloat16. Only the import differs from a model that uses ``nn.Dense``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jaxlinear.linen import Linear as Dense

EPOCHS, BATCH = 30, 32


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Dense(256, dtype=jnp.bfloat16)(x))
        x = nn.relu(Dense(256, dtype=jnp.bfloat16)(x))
        return Dense(10, dtype=jnp.bfloat16)(x).astype(jnp.float32)


@jax.jit
def train_step(state, images, labels):
    def loss(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@jax.jit
def accuracy(state, images, labels):
    logits = state.apply_fn({"params": state.params}, images)
    return (logits.argmax(1) == labels).mean()


def main():
    scans, digits = load_digits(return_X_y=True)
    data = np.float32(scans / 16), np.int32(digits)
    images, test_images, labels, test_labels = train_test_split(*data, random_state=0)

    model = Classifier()
    params = model.init(jax.random.key(0), images[:1])["params"]
    schedule = optax.cosine_decay_schedule(2e-3, EPOCHS * (len(images) // BATCH))
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adamw(schedule)
    )
    for epoch in track(range(EPOCHS), "training"):
        order = np.random.default_rng(epoch).permutation(len(images))
        for batch in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            state = train_step(state, images[batch], labels[batch])
    found = accuracy(state, test_images, test_labels)
    print(f"held-out accuracy: {found:.2%}")


if __name__ == "__main__":
    main()
