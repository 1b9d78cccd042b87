"""The loss of a last layer: ours and its peers, compiled for a device or timed here.

``loss`` is the mean loss of the tokens and the gradients of h and of the weight, and
``loss_value`` only the loss. A contender is a function of h (tokens, in), a weight
(classes, in), labels (tokens,) and the dtype of the products' operands.
"""

from importlib import import_module
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.aot.programs import Case
from benchmarks.aot.timed import medians
from benchmarks.checks import as_float64, relative_error, require, roundoff
from benchmarks.peers import naive as naive_layer
from benchmarks.timing import compiled, interleaved
from jaxlinear import Product, Products, linear, linear_cross_entropy

PROGRAMS = ["loss", "loss_value"]
RESULTS = ["loss", "grad_h", "grad_W"]
ROWS = 512
"""Of a block in float64."""


def unfused(h, weight, labels, dtype):
    """The loss of the float32 logits of our layer."""
    products = Products(*[Product(dtype)] * 3)
    z = linear(h, weight, dtype="float32", products=products)
    of_label = jnp.take_along_axis(z, labels[:, None], -1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(z, -1) - of_label)


def naive(h, weight, labels, dtype):
    """As it is written first, with the logits in float32 after the product."""
    from optax import losses

    z = naive_layer([weight], h, dtype).astype("float32")
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(z, labels))


def ours(h, weight, labels, dtype):
    return linear_cross_entropy(h, weight, labels, dtype=dtype)


def ours_per_token(h, weight, labels, dtype):
    losses = linear_cross_entropy(h, weight, labels, dtype=dtype, reduction="none")
    return jnp.mean(losses)


def tokamax(h, weight, labels, dtype):
    """Its form without kernels; its weight is (in, classes)."""
    return import_module("tokamax").linear_softmax_cross_entropy_loss(
        *(h.astype(dtype), labels, weight.astype(dtype).T),
        reduction="mean",
        implementation="chunked_xla",
    )


CONTENDERS = {
    "unfused": unfused,
    "naive": naive,
    "ours": ours,
    "ours, per token": ours_per_token,
    "tokamax": tokamax,
}


class Sizes(NamedTuple):
    """Tokens, features, the vocabulary."""

    rows: int
    width: int
    classes: int


def function(case):
    """The program of a case: a function of h, the weight and the labels."""

    def loss(h, weight, labels):
        return CONTENDERS[case.contender](h, weight, labels, case.dtype)

    return loss if case.program == "loss_value" else jax.value_and_grad(loss, (0, 1))


def placed(case, device, sizes):
    """The function of a case and its arguments, on ``device``."""
    h = jax.ShapeDtypeStruct((sizes.rows, sizes.width), case.dtype)
    labels = jax.ShapeDtypeStruct((sizes.rows,), "int32")
    arguments = h, *case.parameters(sizes.width, sizes.classes), labels
    sharding = SingleDeviceSharding(device)
    return jax.jit(function(case)), [a.update(sharding=sharding) for a in arguments]


def drawn(sizes):
    """h, a weight that makes logits of variance 1, and labels."""
    generator = np.random.default_rng(0)
    h = generator.standard_normal((sizes.rows, sizes.width), np.float32)
    weight = generator.standard_normal((sizes.classes, sizes.width), np.float32)
    weight *= np.float32(sizes.width**-0.5)
    labels = generator.integers(sizes.classes, size=sizes.rows, dtype=np.int32)
    return jnp.asarray(h), jnp.asarray(weight), jnp.asarray(labels)


def timed_rows(cell):
    """The errors of the results, then medians of the seconds and of the ratios."""
    name, sizes = cell["case"], Sizes(**cell["sizes"])
    h, weight, labels = drawn(sizes)
    programs, errors, exact = {}, {}, None
    for contender in cell["contenders"]:
        case = Case.named(name, contender)
        arguments = h.astype(case.dtype), weight, labels
        exact = exact or exact_results(*arguments, case.dtype)
        programs[contender] = compiled(function(case), arguments)
        found = jax.tree.leaves(programs[contender].call())
        names = RESULTS[: len(found)]
        errors[contender] = dict(zip(names, errors_of(found, exact), strict=True))
        for result, error in errors[contender].items():
            require((name,), contender, result, error, bound(case, sizes))
    samples = interleaved(programs, cell["seconds"])
    others = {name: name for name in ("unfused", "tokamax") if name in samples}
    for contender in samples:
        row = {"contender": contender, "errors": errors[contender]}
        yield row | medians(samples, contender, others)


def errors_of(found, exact):
    return [
        relative_error(as_float64(a), b) for a, b in zip(found, exact, strict=False)
    ]


def exact_results(h, weight, labels, dtype):
    """The loss, ∇h and ∇W in float64, of operands that are rounded to ``dtype``."""
    W = as_float64(weight.astype(dtype))
    count, losses, grad_h, grad_W = len(labels), [], [], np.zeros(W.shape)
    for start in range(0, count, ROWS):
        X = as_float64(h[start : start + ROWS])
        y = np.asarray(labels[start : start + ROWS])
        at_label = np.arange(len(y)), y
        z = X @ W.T
        largest = z.max(-1, keepdims=True)
        G = np.exp(z - largest)
        total = G.sum(-1, keepdims=True)
        losses.append((largest + np.log(total))[:, 0] - z[at_label])
        G /= total
        G[at_label] -= 1
        grad_h.append(G @ W / count)
        grad_W += G.T @ X / count
    return np.mean(np.concatenate(losses)), np.concatenate(grad_h), grad_W


def bound(case, sizes):
    """Four times what independent roundings make, of arrays and of sums in float32.

    Some of the contenders round the logits, G and the result to the products' dtype.
    """
    of_sums = max(sizes) ** 0.5 * roundoff("float32")
    return 4 * (3**0.5 * roundoff(case.dtype) + of_sums)
