"""A small GPT trained on Python's documentation, by its logits and without them."""

import collections
import re
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from benchmarks import model, peers
from benchmarks.checks import roundoff
from benchmarks.results_file import OURS

GPT = model.GPT(
    layers=2, in_features=64, heads=4, tokens=64, batch=8, out_features=8192
)
STEPS, RATE = 40, 0.3


@pytest.fixture(scope="module")
def batches():
    """Words and signs, numbered by how often they occur; random places for a step."""
    words = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()))
    often = collections.Counter(words).most_common(GPT.out_features)
    number = {word: k for k, (word, _) in enumerate(often)}
    text = np.array([number[word] for word in words if word in number], "int32")
    generator = np.random.default_rng(0)
    starts = generator.integers(len(text) - GPT.tokens, size=(STEPS, GPT.batch, 1))
    return text[starts + np.arange(GPT.tokens + 1)]


def trained(loss, batches):
    """The loss of each step, and the temporaries of the compiled step."""

    def step(parameters, tokens):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        update = jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients)
        return value, update

    parameters, losses = model.initial(GPT), []
    lowered = jax.jit(step, donate_argnums=0).lower(parameters, batches[0])
    # Unlike the other tests: these programs are small, and run often.
    compiled = lowered.compile({"xla_backend_optimization_level": 3})
    for tokens in batches:
        value, parameters = compiled(parameters, tokens)
        losses.append(float(value))
    return np.array(losses), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpt_learns_the_same_without_its_logits_in_less_memory(dtype, batches):
    losses = model.losses_of(GPT, {OURS: peers.ours}, dtype)
    with_logits, memory_with = trained(losses[OURS], batches)
    without, memory_without = trained(losses[model.WITH_LOSS], batches)
    print(f"{dtype}: temporaries of {memory_with:,} and {memory_without:,} bytes")
    logits = 4 * GPT.rows * GPT.out_features
    assert memory_with - memory_without > 1.5 * logits
    assert with_logits[-1] < with_logits[0] - 2
    # A token's loss and gradient are rounded, and are sums in float32. The tokens of a
    # batch err independently, so do the steps: one over √rows, and √steps, times four.
    of_token = roundoff(dtype) + GPT.out_features**0.5 * roundoff("float32")
    of_step = 4 * of_token / GPT.rows**0.5 * with_logits[0]
    difference = abs(without - with_logits) / np.arange(1, STEPS + 1) ** 0.5
    assert difference.max() < of_step
