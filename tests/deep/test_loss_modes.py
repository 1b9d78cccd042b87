"""The loss in every mode of JAX, and with NaN and infinity, beside that with logits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracle import problem, relative, unfused

from jaxlinear import linear_cross_entropy

OPTIONS = {"label_smoothing": 0.2, "z_loss": 1e-3, "soft_cap": 5.0}

# NaN and infinity.


@pytest.mark.parametrize("classes", [50, 5000])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["bias", "label of the bias", "h"])
def test_nan_and_infinity_end_where_it_would_with_logits(
    classes, reduction, value, place
):
    h, weight, labels, bias, _ = problem(classes, (30,))
    labels = jnp.where(labels < 0, -1, labels)
    if place == "h":
        h = h.at[3, 0].set(value)
    else:
        bias = bias.at[labels[0] if "label" in place else classes // 2].set(value)
    places = (0, 1, 2)

    def ours(h, weight, bias):
        return linear_cross_entropy(h, weight, labels, bias, reduction=reduction).sum()

    def with_logits(h, weight, bias):
        return unfused(h, weight, labels, bias).sum()

    found = jax.value_and_grad(ours, places)(h, weight, bias)
    expected = jax.value_and_grad(with_logits, places)(h, weight, bias)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# Modes.

SMALL = {"leading": (4, 6), "features": 5}


def in_modes():
    def hessian_vector(f, arrays):
        gradient = jax.grad(f, (0, 1, 2))
        return jax.jvp(gradient, arrays, arrays)[1]

    def reverse_twice(f, arrays):
        def norm(*arrays):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(f, (0, 1, 2))(*arrays))

        return jax.grad(norm, (0, 1, 2))(*arrays)

    def scanned(f, arrays):
        def body(total, _):
            return total + f(*arrays), None

        return jax.lax.scan(body, jnp.zeros(()), None, length=2)[0]

    return {
        "value": lambda f, arrays: f(*arrays),
        "gradients": lambda f, arrays: jax.grad(f, (0, 1, 2))(*arrays),
        "jvp": lambda f, arrays: jax.jvp(f, arrays, arrays),
        "jacfwd": lambda f, arrays: jax.jacfwd(f, 2)(*arrays),
        "linearize": lambda f, arrays: jax.linearize(f, *arrays)[1](*arrays),
        "Hessian-vector": hessian_vector,
        "reverse twice": reverse_twice,
        "remat": lambda f, arrays: jax.grad(jax.checkpoint(f), (0, 1, 2))(*arrays),
        "scan": scanned,
        "gradient of scan": lambda f, arrays: jax.grad(
            lambda *a: scanned(f, a), (0, 1, 2)
        )(*arrays),
    }


@pytest.mark.parametrize("mode", in_modes())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_mode_has_the_values_of_the_loss_with_logits(mode, reduction):
    h, weight, labels, bias, weights = problem(1100, **SMALL)

    def ours(h, weight, bias):
        options = {"reduction": reduction, "weights": weights, **OPTIONS}
        found = linear_cross_entropy(h, weight, labels, bias, **options)
        return jnp.sum(jnp.sin(found / 8))

    def with_logits(h, weight, bias):
        losses = weights * unfused(h, weight, labels, bias, **OPTIONS)
        whole = jnp.sum(jnp.where(labels < 0, 0, weights))
        losses = losses.sum() / whole if reduction == "mean" else losses
        return jnp.sum(jnp.sin(losses / 8))

    arrays = h, weight, bias
    apply = in_modes()[mode]
    found = jax.jit(lambda *a: apply(ours, a))(*arrays)
    expected = jax.jit(lambda *a: apply(with_logits, a))(*arrays)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative(ours, theirs) <= 1e-5


MAPPED = [axes for axes in itertools.product((0, None), repeat=4) if 0 in axes]
# Both losses with one array mapped and with all, the mean with each choice of them.
MAPS = [("mean", axes) for axes in MAPPED]
MAPS += [("none", axes) for axes in MAPPED if axes.count(0) in (1, 4)]


@pytest.mark.parametrize(("reduction", "axes"), MAPS, ids=str)
def test_maps_and_their_gradients(axes, reduction):
    h, weight, labels, bias, weights = problem(40, (3, 6), features=5)
    several = (
        h,
        jnp.stack([weight, 2 * weight, 3 * weight]),
        jnp.maximum(labels, 0),
        jnp.stack([bias, 2 * bias, 3 * bias]),
    )
    one = h[0], weight, jnp.maximum(labels, 0)[0], bias
    arrays = [m if a == 0 else o for m, o, a in zip(several, one, axes, strict=True)]

    def ours(h, weight, labels, bias):
        options = {"reduction": reduction, "weights": weights[0]}
        return linear_cross_entropy(h, weight, labels, bias, **options).sum()

    def with_logits(h, weight, labels, bias):
        losses = weights[0] * unfused(h, weight, labels, bias)
        return losses.sum() / (weights[0].sum() if reduction == "mean" else 1)

    def results(f):
        mapped = jax.vmap(f, axes)
        yield mapped(*arrays)
        yield jax.grad(lambda *a: jnp.sin(mapped(*a)).sum(), (0, 1, 3))(*arrays)
        yield jax.vmap(jax.grad(f, (0, 1, 3)), axes)(*arrays)

    found, expected = (
        jax.jit(lambda f=f: [*results(f)])() for f in (ours, with_logits)
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative(ours, theirs) <= 1e-5
