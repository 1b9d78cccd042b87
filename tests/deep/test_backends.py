"""No backend is started for a call of shapes, and none is asked that is not there.

Nor do the tests start an accelerator.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
for name in "XLA_FLAGS", "BFLOAT16_FORM", "MUTANT":
    ENVIRONMENT.pop(name, None)

RECIPES = (
    "dict(), dict(dtype='bfloat16'), dict(dtype='float16'), dict(dtype='complex64')"
)
RECIPES += ", *(dict(products=p) for p in (FLOAT8, FLOAT8_E4M3, INT8))"

PREPARED = f"""
import os
import jax, jax.numpy as jnp
from jaxlinear import FLOAT8, FLOAT8_E4M3, INT8, explain, linear
from jaxlinear import linen, nnx as ours
from flax import nnx

RECIPES = [{RECIPES}]

def step(x, weight, bias, options):
    def loss(x, weight, bias):
        return jnp.sum(linear(x, weight, bias, **options).astype("complex64").real)
    return jax.value_and_grad(loss, (0, 1, 2))(x, weight, bias)
"""

ABSTRACT = """
arrays = [jax.ShapeDtypeStruct(s, "float32") for s in [(4, 32), (64, 32), (64,)]]
for rows in 1, 4:
    arrays[0] = jax.ShapeDtypeStruct((rows, 32), "float32")
    for options in RECIPES:
        one = lambda *arrays: step(*arrays, options)
        jax.eval_shape(one, *arrays)
        jax.make_jaxpr(jax.vmap(one, (0, None, None)))(*arrays)
        jax.jit(one).trace(*arrays)
        make = lambda: ours.Linear(8, 8, rngs=nnx.Rngs(0), **options)
        nnx.eval_shape(make)
        layer = linen.Linear(8, **options)
        jax.eval_shape(layer.init, jax.eval_shape(lambda: jax.random.key(0)), arrays[0])
jax.config.update("jax_num_cpu_devices", 3)
jax.distributed.initialize("127.0.0.1:" + os.environ["PORT"], 1, 0)
print(jax.device_count())
"""

ELSEWHERE = """
from jax.extend import backend
from jaxlib import xla_client

backend.register_backend_factory("other", xla_client.make_cpu_client, priority=500)
arrays = [jnp.ones(shape) for shape in [(4, 32), (64, 32), (64,)]]
for rows in 1, 4:
    arrays[0] = jnp.ones((rows, 32))
    for options in RECIPES:
        one = lambda *arrays: step(*arrays, options)
        (eager, _), (loss, gradients) = one(*arrays), jax.jit(one)(*arrays)
        for found, expected in [(loss, rows * 64 * 33), (eager, rows * 64 * 33)]:
            assert abs(found / expected - 1) < 1e-6, (options, found)
        for found, expected in zip(gradients, (64, rows, rows)):
            assert jnp.allclose(found, expected, rtol=1e-6), (options, found)
        jax.jit(jax.vmap(one, (0, None, None)))(*arrays)
        jax.export.export(jax.jit(one), platforms=["cpu", "cuda", "tpu"])(*arrays)
        explain(linear, *arrays, **options)
try:
    jax.devices("cpu")
except RuntimeError as error:
    print(error)
"""


def run(program, **environment):
    """Run ``program`` without the flags and the devices of these tests."""
    environment = {**ENVIRONMENT, **environment}
    arguments = [sys.executable, "-W", "error", "-c", PREPARED + program]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_of_shapes_start_no_backend():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert run(ABSTRACT, PORT=str(port)) == "3\n"


def test_a_process_without_a_cpu_backend_runs_every_recipe():
    # Another CPU client takes the place of an accelerator, which JAX_PLATFORMS names.
    assert "Unknown backend cpu" in run(ELSEWHERE, JAX_PLATFORMS="other")


# A plugin, found as that of `jax[cuda]` is, whose device JAX prefers to the CPUs.
PLUGIN = """
from jax.extend.backend import register_backend_factory

def start():
    raise RuntimeError("the accelerator was started")

def initialize():
    register_backend_factory("accelerator", start, priority=500, fail_quietly=False)
"""


def test_the_tests_do_not_start_an_accelerator(tmp_path):
    folder = tmp_path / "jax_plugins" / "accelerator"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PLUGIN)
    root = ENVIRONMENT["PYTHONPATH"]
    environment = ENVIRONMENT | {"PYTHONPATH": f"{root}:{tmp_path}"}
    environment.pop("JAX_PLATFORMS", None)

    def of(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True
        )

    found = of("-c", "import jax; jax.devices()")
    assert "the accelerator was started" in found.stderr
    # A test with eight devices, and one that starts a process.
    tested = of(
        *("-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider"),
        "tests/test_mixed_precision.py::"
        "test_weight_gradient_is_reduced_across_devices_in_float32",
        "tests/test_in_every_mode.py::"
        "test_the_folder_works_as_a_copy_without_the_package",
    )
    assert "2 passed" in tested.stdout, tested.stdout + tested.stderr
