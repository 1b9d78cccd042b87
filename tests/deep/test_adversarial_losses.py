"""Losses of extreme arguments against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracle import (
    as_float64,
    exact,
    exact_loss,
    exact_loss_gradients,
    loss_and_gradients,
    problem,
)

from jaxlinear import linear_cross_entropy

ADVERSARIAL = {
    "all tokens ignored": (1100, 30),
    "one token": (1100, 1),
    "one class": (1, 30),
    "equal logits": (1100, 30),
    "logits of 1e4": (1100, 30),
    "no block divides the vocabulary": (2503, 30),
    "no block divides the rows": (7, 515),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_adversarial_losses_and_gradients_are_those_of_float64(name, dtype, reduction):
    classes, rows = ADVERSARIAL[name]
    h, weight, labels, bias, _ = problem(classes, (rows,), dtype=dtype)
    if name == "all tokens ignored":
        labels = jnp.full_like(labels, -100)
    if name == "one token":
        labels = labels.at[0].set(3)
    if name == "equal logits":
        weight, bias = jnp.broadcast_to(weight[:1], weight.shape), 0 * bias
    if name == "logits of 1e4":  # Positive and negative.
        h = h.at[:, 0].set(1e4).at[::2, 0].set(-1e4)
        weight = weight.at[:, 0].set(jnp.sign(weight[:, 0]))
    options = {"reduction": reduction}

    def loss(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, **options)

    found, gradients = loss_and_gradients(loss, h, weight, bias)
    arguments = h, weight, labels, bias
    _, _, z = exact(*arguments)
    u, eps = (float(jnp.finfo(d).eps) for d in ("float32", dtype))
    largest = 1 + np.abs(z).max()
    tokens = 1 if reduction == "mean" else rows
    expected = exact_loss(*arguments, **options).sum()
    assert abs(found - expected) <= 4 * u * largest * tokens
    expected = exact_loss_gradients(*arguments, **options)
    of_terms = norms_of_terms(h, weight, tokens)
    # G is rounded for two of the products. Where the logits are equal, all of a row is
    # rounded in the same direction.
    of_G = eps, eps, u
    for k, gradient in enumerate(gradients):
        assert np.all(np.isfinite(as_float64(gradient)))
        error = np.linalg.norm(as_float64(gradient) - expected[k])
        own = eps * np.linalg.norm(expected[k])
        assert error <= own + (of_G[k] + 4 * u * largest) * of_terms[k]


def norms_of_terms(h, weight, tokens):
    """Of ∇h, ∇W and ∇B at most, if the losses are as many, or their mean is one."""
    rows = np.linalg.norm(as_float64(h), axis=-1)
    classes = np.linalg.norm(as_float64(weight), axis=-1)
    return 2 * tokens * classes.max(), 2 * tokens * rows.max(), 2 * tokens
