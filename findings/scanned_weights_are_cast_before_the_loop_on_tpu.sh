#!/usr/bin/env bash
# libtpu 0.0.50.1, JAX 0.12.0.1, compiled for a TPU v5e without one: a scan that casts one
# float32 weight in each step gets the bfloat16 cast of all weights, made before the loop.
# The optimization barrier that jax.checkpoint puts around the cast does not prevent it.
# XLA for CPUs casts in the loop: no bfloat16 stack is an operand of its loop.
# Output: for each compiler, how many loops have an operand bf16[16,2048,2048]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_LOG_DIR=disabled TF_CPP_MIN_LOG_LEVEL=2
"$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


@jax.checkpoint
def layer(x, weight):
    return jnp.dot(x, weight.astype("bfloat16"))


def loss(weights, x):
    def step(x, weight):
        return jax.nn.gelu(layer(x, weight)), None

    return jnp.sum(jax.lax.scan(step, x, weights)[0].astype("float32"))


def loops(device, platform):
    sharding = SingleDeviceSharding(device)
    weights, x = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((16, 2048, 2048), "float32"), ((512, 2048), "bfloat16"))
    )
    traced = jax.jit(jax.grad(loss)).trace(weights, x)
    text = traced.lower(lowering_platforms=(platform,)).compile().as_text()
    found = re.findall(r"= \((.*?)\) while\(", text)
    return sum("bf16[16,2048,2048]" in operands for operands in found)


print("tpu", loops(topology.devices[0], "tpu"))
print("cpu", loops(jax.devices("cpu")[0], "cpu"))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
tpu 2
cpu 0
EXPECTED
