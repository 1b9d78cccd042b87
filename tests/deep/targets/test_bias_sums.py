"""In which dtype, and in how many parts, accelerators sum the gradient of a bias."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.aot.targets import SETTINGS, missing

# In a process of its own: the compiler may end the one that it runs in.
PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from benchmarks import outcomes
from benchmarks.aot import targets

target, shape, contender = {target!r}, {shape!r}, {contender!r}
layer, width = outcomes.CONTENDERS[contender], 128

@jax.jit
def gradient(x, weight, bias, G):
    return jax.vjp(layer, x, weight, bias)[1](G)[2]

where = SingleDeviceSharding(targets.devices(target, 1)[0])
arguments = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for shape, dtype in (
        ((*shape, width), "bfloat16"),
        ((width, width), "float32"),
        ((width,), "float32"),
        ((*shape, width), "bfloat16"),
    )
)
traced = gradient.trace(*arguments)
lowered = traced.lower(lowering_platforms=(targets.platform(target),))
print(json.dumps(lowered.compile().as_text()))
"""


def program(target, shape, contender):
    if why := missing(target, 1):
        pytest.skip(why)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**locals())],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def sums_of_bias(text):
    """The dtype and the shape of each sum that ends in the 128 values of the bias."""
    found = re.findall(r"= (\w+)\[((?:\d+,)?128)\]\S* reduce\(", text)
    return sorted((dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found)


def additions(text):
    """The dtypes in which the functions that `reduce` applies add."""
    names = set(re.findall(r"reduce\(.*to_apply=%([\w.-]+)", text))
    bodies = re.findall(
        r"^%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE
    )
    return {
        dtype
        for name, body in bodies
        if name in names
        for dtype in re.findall(r"= (\w+)\[\]\S* add\(", body)
    }


# The order that `benchmarks.outcomes.summed_like_an_h100` imitates.
PARTS = {
    (32, 32): [(128,)],
    (64, 64): [(128,)],
    (128, 128): [(128,), (128, 128)],
    (65536,): [(128,), (256, 128)],
    (256, 256): [(128,), (256, 128)],
}


@pytest.mark.parametrize("shape", PARTS, ids=str)
def test_an_h100_adds_the_terms_of_flax_in_bfloat16_in_root_n_parts(shape):
    text = program("h100", shape, "Flax NNX")
    assert sums_of_bias(text) == sorted(("bf16", part) for part in PARTS[shape])
    assert additions(text) == {"bf16"}


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_ours_are_added_in_float32(target):
    text = program(target, (64, 64), "jaxlinear")
    assert {dtype for dtype, _ in sums_of_bias(text)} == {"f32"}
    assert additions(text) == {"f32"}


def test_a_v5e_is_told_to_add_in_bfloat16():
    text = program("v5e", (64, 64), "Flax NNX")
    assert sums_of_bias(text) == [("bf16", (128,))]
    assert additions(text) == {"bf16"}
