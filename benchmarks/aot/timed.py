"""The time of a stack on this CPU: gradients are checked, contenders timed in turn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.programs import Case
from benchmarks.aot.stacks import Sizes, stack
from benchmarks.checks import as_float64, relative_error, require, roundoff
from benchmarks.timing import compiled, interleaved, ratios


def rows(cell):
    """Medians of the seconds, and of the ratios to two of the contenders in a round."""
    name, sizes = cell["case"], Sizes(**cell["sizes"])
    weights, x = drawn(stack(Case.named(name, "naive"), sizes))
    naive = Case.named(name.replace("mixed", "float32"), "naive")
    exact, programs = gradient(naive, sizes, weights, x), {}
    for contender, line in itertools.product(cell["contenders"], cell["lines"]):
        case = Case.named(name, contender, line)
        found = gradient(case, sizes, weights, x)
        error = max(map(relative_error, found, exact))
        require((name,), f"{contender}, {line}", "gradient", error, bound(sizes))
        step = stack(case, sizes).step
        programs[contender, line] = compiled(step, arguments(case, weights, x))
    samples = interleaved(programs, cell["seconds"])
    others = {"naive": ("naive", None), "ours": ("ours", None)}
    for contender, line in samples:
        row = {"contender": contender, "line": line}
        yield row | medians(samples, (contender, line), others)


def medians(samples, key, others):
    """Of the seconds of a program, and of their ratios to those of ``others``."""
    seconds = samples[key]
    found = {
        f"to {name}": float(np.median(ratios(seconds, samples[k])))
        for name, k in others.items()
    }
    return {"median_s": float(np.median(seconds)), "rounds": len(seconds), **found}


def bound(sizes):
    """Twenty roundings of a layer, independent and in series: 4 √count u."""
    return 4 * (20 * sizes.layers) ** 0.5 * roundoff("bfloat16")


def drawn(shapes):
    """Parameters, with every weight (out, in), and x."""
    generator = np.random.default_rng(0)

    def normal(shape, scale=1.0):
        values = generator.standard_normal(shape, np.float32) * np.float32(scale)
        return jnp.asarray(values)

    linear = jax.tree.map(
        lambda a: normal(a.shape, a.shape[-1] ** -0.5), shapes.parameters["linear"]
    )
    ones = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes.parameters)
    return ones | {"linear": linear}, normal(shapes.x.shape)


def arguments(case, parameters, x):
    """As the layers of a case have them."""
    return turned(case, parameters), x.astype(case.dtype)


def turned(case, parameters):
    if not case.is_transposed:
        return parameters
    return parameters | {"linear": jax.tree.map(lambda a: a.mT, parameters["linear"])}


def gradient(case, sizes, parameters, x):
    """Each leaf of the gradient, of weights (out, in)."""
    loss = jax.jit(jax.grad(stack(case, sizes).loss))
    found = loss(*arguments(case, parameters, x))
    return [as_float64(leaf) for leaf in jax.tree.leaves(turned(case, found))]
