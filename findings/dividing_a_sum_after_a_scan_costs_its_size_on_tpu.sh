#!/usr/bin/env bash
# libtpu 0.0.50.1, JAX 0.12.0.1, compiled for a TPU v5e without one: dividing the result
# of a `lax.scan` by a scalar costs temporaries of the result's size, here 64 MiB. The
# undivided result costs none, nor does dividing what is summed in each step. XLA for CPUs
# needs the same for all three.
# Output: for each compiler, the temporaries in MiB undivided, divided in each step, and
# divided after the loop
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
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")


def undivided(x, weight, count):
    def step(total, block):
        return total + block.T @ jax.nn.softmax(block @ weight), None

    return jax.lax.scan(step, jnp.zeros_like(weight), x)[0]


def divided_in_each_step(x, weight, count):
    def step(total, block):
        return total + (block / count).T @ jax.nn.softmax(block @ weight), None

    return jax.lax.scan(step, jnp.zeros_like(weight), x)[0]


def divided_after(x, weight, count):
    return undivided(x, weight, count) / count


def temporaries(function, device):
    sharding = SingleDeviceSharding(device)
    arguments = (
        jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
        for shape in ((8, 512, 512), (512, 32768), ())
    )
    lowered = jax.jit(function).trace(*arguments).lower(
        lowering_platforms=(device.platform,)
    )
    memory = lowered.compile().memory_analysis()
    return f"{memory.temp_size_in_bytes / 2**20:.0f}"


for device in topology.devices[0], jax.devices("cpu")[0]:
    functions = undivided, divided_in_each_step, divided_after
    print(device.platform, *(temporaries(f, device) for f in functions))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
tpu 0 0 64
cpu 129 129 129
EXPECTED
