"""Programs exported with ``jax.export``, run in a process that has no jaxlinear."""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from oracle import assert_rounded_once, exact, output_and_gradients, random_problem

from jaxlinear import linear

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")

import jaxlinear.linen  # noqa: E402
import jaxlinear.nnx  # noqa: E402

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCHES = (3, 7)
IN, OUT = 6, 4
DTYPES = {"float32": None, "mixed": "bfloat16"}
INPUTS = {batch: random_problem((batch,), IN, OUT, "float32") for batch in BATCHES}
_, WEIGHT, BIAS, _ = INPUTS[BATCHES[0]]  # The same for every batch.

# What runs in the other process, in a folder with the artifacts and their inputs. It
# leaves the outputs there, in float32, and prints their dtypes and what else it found.
CONSUMER = """
import json, pathlib, sys

sys.modules["jaxlinear"] = None  # From here on, every import of it fails.
try:
    import jaxlinear
except ModuleNotFoundError:
    print("no jaxlinear", file=sys.stderr)

import jax, numpy as np
from jax import export

def with_gradients(forward):
    def outputs(x, weight, bias, G):
        Y, vjp = jax.vjp(forward, x, weight, bias)
        return Y, *vjp(G)
    return outputs

found = {}
for file in pathlib.Path().glob("*.exported"):
    exported = export.deserialize(bytearray(file.read_bytes()))
    if file.stem.startswith("forward"):
        function = jax.jit(with_gradients(exported.call))
        avals = (*exported.in_avals, *exported.out_avals)
    else:
        function = jax.jit(exported.call)
        avals = exported.in_avals
    found[file.stem] = report = {"held": exported.platforms, "lowered": []}
    for inputs in pathlib.Path().glob("inputs-*.npz"):
        arguments = [
            jax.numpy.asarray(array, aval.dtype)
            for array, aval in zip(np.load(inputs).values(), avals)
        ]
        outputs = jax.tree.leaves(function(*arguments))
        report["dtypes"] = [array.dtype.name for array in outputs]
        batch = inputs.stem.removeprefix("inputs-")
        np.savez(f"{file.stem}-{batch}", *(np.float32(array) for array in outputs))
    for platform in exported.platforms:
        function.trace(*arguments).lower(lowering_platforms=(platform,))
        report["lowered"].append(platform)
print(json.dumps(found))
"""


def gradients_too(dtype, *arguments):
    return output_and_gradients(functools.partial(linear, dtype=dtype), *arguments)


def nnx_forward(dtype, x):
    layer = jaxlinear.nnx.Linear(IN, OUT, dtype=dtype, rngs=nnx.Rngs(0))
    layer.weight.set_value(WEIGHT)
    layer.bias.set_value(BIAS)
    return layer(x)


def linen_forward(dtype, x):
    params = {"params": {"weight": WEIGHT, "bias": BIAS}}
    return jaxlinear.linen.Linear(OUT, dtype=dtype).apply(params, x)


# name: what is exported, how many of x, weight, bias and G it takes, and the order of
# the derivatives in the artifact
PROGRAMS = {
    "gradients": (gradients_too, 4, 0),
    "forward": (lambda dtype, *arguments: linear(*arguments, dtype=dtype), 3, 1),
    "nnx": (nnx_forward, 1, 0),
    "linen": (linen_forward, 1, 0),
}


def symbolic_arguments(dtype):
    """Types of x, weight, bias and G for any batch."""
    (batch,) = export.symbolic_shape("batch")
    return (
        jax.ShapeDtypeStruct((batch, IN), "float32"),
        jax.ShapeDtypeStruct((OUT, IN), "float32"),
        jax.ShapeDtypeStruct((OUT,), "float32"),
        jax.ShapeDtypeStruct((batch, OUT), dtype or "float32"),
    )


@pytest.fixture(scope="module")
def consumed(tmp_path_factory):
    """The folder where the other process has run, and what it found."""
    folder = tmp_path_factory.mktemp("consumer")
    for name, (function, arity, order) in PROGRAMS.items():
        for key, dtype in DTYPES.items():
            program = jax.jit(functools.partial(function, dtype))
            exported = export.export(program, platforms=PLATFORMS)(
                *symbolic_arguments(dtype)[:arity]
            )
            artifact = folder / f"{name}-{key}.exported"
            artifact.write_bytes(exported.serialize(vjp_order=order))
    for batch, arrays in INPUTS.items():
        np.savez(folder / f"inputs-{batch}", *arrays)
    # Isolated: neither this folder nor PYTHONPATH is searched for modules.
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", CONSUMER],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "no jaxlinear\n")
    return folder, json.loads(result.stdout)


def outputs(folder, name, key, batch):
    return list(np.load(folder / f"{name}-{key}-{batch}.npz").values())


each_case = pytest.mark.parametrize(
    ("name", "key", "batch"),
    [(n, k, b) for n in PROGRAMS for k in DTYPES for b in BATCHES],
)


@each_case
def test_exported_values_are_rounded_once_in_a_process_without_jaxlinear(
    consumed, name, key, batch
):
    folder, found = consumed
    x, weight, bias, G = INPUTS[batch]
    compute = DTYPES[key] or "float32"
    x, weight, G = (array.astype(compute) for array in (x, weight, G))
    expected = list(exact(x, weight, bias, G))
    dtypes = [compute, "float32", "float32", "float32"]
    terms = [IN + 1, OUT, batch, batch]
    actual = outputs(folder, name, key, batch)
    number = 4 if name in ("gradients", "forward") else 1
    assert found[f"{name}-{key}"]["dtypes"] == dtypes[:number]
    for values, dtype, (value, magnitude), n in zip(
        actual, dtypes, expected, terms, strict=False
    ):
        assert_rounded_once(values.astype(jnp.dtype(dtype)), value, magnitude, n)


@each_case
def test_exported_values_are_bit_for_bit_those_of_this_process(
    consumed, name, key, batch
):
    folder, _ = consumed
    x, weight, bias, G = INPUTS[batch]
    function, arity, _ = PROGRAMS["gradients" if name == "forward" else name]
    G = G.astype(DTYPES[key] or "float32")
    expected = jax.jit(functools.partial(function, DTYPES[key]))(
        *(x, weight, bias, G)[:arity]
    )
    for a, e in zip(
        outputs(folder, name, key, batch), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, np.float32(e))


@pytest.mark.parametrize("key", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_artifact_holds_the_programs_of_all_platforms(consumed, name, key):
    _, found = consumed
    assert found[f"{name}-{key}"]["held"] == list(PLATFORMS)
    assert found[f"{name}-{key}"]["lowered"] == list(PLATFORMS)


def test_an_artifact_of_one_platform_is_refused_on_another():
    # Why the test above proves something.
    *arguments, _ = INPUTS[3]
    exported = export.export(jax.jit(linear), platforms=("cpu",))(*arguments)
    traced = jax.jit(exported.call).trace(*arguments)
    message = re.escape("was exported for platforms '('cpu',)' but it is used on")
    with pytest.raises(ValueError, match=message):
        traced.lower(lowering_platforms=("tpu",))
