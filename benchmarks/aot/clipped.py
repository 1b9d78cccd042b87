"""Clipped gradients of single examples: ours, jax-privacy's, and what they are made of.

A case is a model: ``vectors`` and ``sequences`` are a stack of layers with tanh, of one
vector or of some tokens for each example, ``scanned`` is the second under `lax.scan`,
and ``small_gpt`` is the benchmarks' GPT of smaller sizes. ``plain`` is the gradient of
the mean loss, which no example is clipped in.
"""

import dataclasses
from importlib import import_module
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from benchmarks import model, peers
from benchmarks.aot.programs import Case
from benchmarks.aot.timed import medians
from benchmarks.checks import as_float64, relative_error, require
from benchmarks.timing import compiled, interleaved
from jaxlinear import clipped_grad, linear, squared_grad_norms

MODELS = ["vectors", "sequences", "scanned", "small_gpt"]
BOUND = 1e-3
"""Of the norm of an example's gradient: below that of most."""

ERROR = 1e-4
"""Of a clipped gradient in float32, with the sums in another order."""


class Sizes(NamedTuple):
    """Examples, tokens of each, features, layers, and those of a microbatch."""

    batch: int
    tokens: int = 1
    width: int = 512
    layers: int = 4
    microbatch: int | None = None

    @property
    def gpt(self):
        fields = {"layers": self.layers, "in_features": self.width, "heads": 4}
        fields |= {"tokens": self.tokens, "batch": self.batch, "out_features": 1024}
        return dataclasses.replace(model.GPT_STEP, **fields)


def plain(loss, sizes):
    return jax.grad(loss)


def norms(loss, sizes):
    return squared_grad_norms(loss)


def one_pass(loss, sizes):
    return clipped_grad(loss, l2_clip_norm=BOUND, normalize_by=sizes.batch)


def two_passes(loss, sizes):
    options = {"l2_clip_norm": BOUND, "normalize_by": sizes.batch}
    return clipped_grad(loss, passes=2, **options)


def jax_privacy(loss, sizes):
    return import_module("jax_privacy.clipping").clipped_grad(
        loss,
        l2_clip_norm=BOUND,
        normalize_by=sizes.batch,
        microbatch_size=sizes.microbatch,
    )


CONTENDERS = {
    "plain": plain,
    "norms": norms,
    "one pass": one_pass,
    "two passes": two_passes,
    "jax-privacy": jax_privacy,
}


def loss_of(case, sizes):
    """The mean loss of a batch: a function of parameters and the batch."""
    if case.program == "small_gpt":
        return model.loss_of(sizes.gpt, peers.ours, case.dtype)

    def apply(x, parameters):
        return jnp.tanh(linear(x, *parameters, dtype=case.dtype)), None

    def loss(parameters, x):
        if case.program == "scanned":
            y, _ = lax.scan(apply, x, parameters)
        else:
            y = x
            for one in zip(*parameters, strict=True):
                y, _ = apply(y, one)
        return jnp.mean(jnp.square(y.astype("float32")))

    return loss


def drawn(case, sizes):
    """Parameters in float32, and a batch."""
    generator = np.random.default_rng(0)
    if case.program == "small_gpt":
        gpt = sizes.gpt
        shape = gpt.batch, gpt.tokens + 1
        return model.initial(gpt), jnp.asarray(
            generator.integers(gpt.out_features, size=shape, dtype=np.int32)
        )

    def normal(*shape, scale=1.0):
        values = generator.standard_normal(shape, np.float32)
        return jnp.asarray(values * np.float32(scale))

    layers, width = sizes.layers, sizes.width
    leading = () if case.program == "vectors" else (sizes.tokens,)
    x = normal(sizes.batch, *leading, width).astype(case.dtype)
    weights, biases = (
        normal(layers, width, width, scale=width**-0.5),
        normal(layers, width),
    )
    if case.program == "scanned":
        return (weights, biases), x
    return ([*weights], [*biases]), x


def function(case, sizes):
    return CONTENDERS[case.contender](loss_of(case, sizes), sizes)


def placed(case, device, sizes):
    """The function of a case and its arguments, on ``device``."""
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: a.update(sharding=sharding),
        jax.eval_shape(lambda: drawn(case, sizes)),
    )
    return jax.jit(function(case, sizes)), arguments


def timed_rows(cell):
    """The error of a gradient, then medians of the seconds and of the ratios."""
    name, sizes = cell["case"], Sizes(**cell["sizes"])
    programs, errors = {}, {}
    arguments = drawn(Case.named(name, "plain"), sizes)
    exact = flat(by_examples(name, sizes, arguments))
    for contender in cell["contenders"]:
        case = Case.named(name, contender)
        programs[contender] = compiled(function(case, sizes), arguments)
        if contender in ("plain", "norms"):
            continue
        error = relative_error(flat(programs[contender].call()), exact)
        limit = ERROR if case.dtype == "float32" else 1e-2
        require((name,), contender, "gradient", error, limit)
        errors[contender] = error
    samples = interleaved(programs, cell["seconds"])
    others = {n: n for n in ("plain", "jax-privacy") if n in samples}
    for contender in samples:
        row = {"contender": contender, "error": errors.get(contender)}
        yield row | medians(samples, contender, others)


def flat(tree):
    """One vector of float64 from all leaves."""
    return np.concatenate([as_float64(a).ravel() for a in jax.tree.leaves(tree)])


def by_examples(name, sizes, arguments):
    """The clipped gradient in float32, one example after the other."""
    parameters, batch = arguments
    loss = loss_of(Case.named(name.replace("mixed", "float32"), "plain"), sizes)
    gradient = jax.grad(loss)

    def step(total, example):
        found = gradient(parameters, example[None])
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(found)))
        factor = jnp.minimum(1, BOUND / norm) / sizes.batch
        return jax.tree.map(lambda t, f: t + factor * f, total, found), None

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return jax.jit(lambda: lax.scan(step, zeros, batch)[0])()
