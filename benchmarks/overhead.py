"""What Python and the compiler cost: a call at a tiny shape, and a deep model."""

import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxlinear
from benchmarks.peers import is_installed
from benchmarks.results_file import OURS
from benchmarks.timing import eager, interleaved

LAYERS, FEATURES = 24, 64


def dispatch(seconds):
    """Seconds of a call from Python at (1, 4) x (4, 4): {name: median}."""
    x, weight, bias = jnp.ones((1, 4)), jnp.ones((4, 4)), jnp.ones(4)
    naive = jax.jit(lambda x, weight, bias: x @ weight.T + bias)

    def program(layer):
        return eager(lambda: jax.block_until_ready(layer(x, weight, bias)))

    programs = {OURS: program(jaxlinear.linear), "jitted naive": program(naive)}
    samples = interleaved(programs, seconds)
    return {name: float(np.median(s)) for name, s in samples.items()}


def deep_model(rounds):
    """Seconds to trace, and to compile, the gradient of 24 layers: {name: {...}}."""
    if not is_installed("flax"):
        return {}
    from flax import nnx

    from jaxlinear.nnx import Linear

    spent = {OURS: [], "Flax NNX": []}
    for _ in range(rounds):
        for name, layer in {OURS: Linear, "Flax NNX": nnx.Linear}.items():
            spent[name].append(_trace_and_compile(nnx, layer))
    return {
        name: dict(zip(["trace_s", "compile_s"], np.median(s, axis=0), strict=True))
        for name, s in spent.items()
    }


def _trace_and_compile(nnx, layer):
    rngs = nnx.Rngs(0)
    model = nnx.List([layer(FEATURES, FEATURES, rngs=rngs) for _ in range(LAYERS)])
    graph, parameters = nnx.split(model)

    def loss(parameters, x):
        for layer in nnx.merge(graph, parameters):
            x = jnp.tanh(layer(x))
        return jnp.sum(x)

    jax.clear_caches()
    step = jax.jit(jax.grad(loss))
    start = time.perf_counter()
    lowered = step.lower(parameters, jnp.ones((8, FEATURES)))
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def overhead(quick):
    return {
        "dispatch": dispatch(0.5 if quick else 5),
        "24 layers": deep_model(3 if quick else 9),
    }
