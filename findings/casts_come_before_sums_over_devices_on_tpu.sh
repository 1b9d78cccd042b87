#!/usr/bin/env bash
# libtpu 0.0.50.1, JAX 0.12.0.1, compiled for eight TPUs v5e without one: a float32 product
# over split rows that is cast to bfloat16 is cast before the devices sum their parts, so
# the sum is bfloat16 too. XLA for CPUs sums in float32, then casts. A bfloat16 product
# that is cast to float32 is summed on TPUs before the cast. `preferred_element_type` asks
# for float32 sums, and on TPUs a cast of the result decides about those of the devices.
# Output: for each compiler, dtypes of the product and of the result, and of the collective
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    "$python" --version >/dev/null 2>&1 && break
done
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export TPU_ACCELERATOR_TYPE=v5litepod-8 TPU_LOG_DIR=disabled TF_CPP_MIN_LOG_LEVEL=2
export XLA_FLAGS=--xla_force_host_platform_device_count=8
"$folder/env/bin/python" - >"$folder/found" <<'PYTHON'
import re

import jax
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")


def collective(devices, product, result):
    mesh = Mesh(np.array(devices), ("data",))

    def gradient(G, x):
        axes = (((0,), (0,)), ((), ()))
        found = lax.dot_general(G, x, axes, preferred_element_type=product)
        return found.astype(result)

    rows = NamedSharding(mesh, PartitionSpec("data"))
    G, x = (
        jax.ShapeDtypeStruct((4096, size), "bfloat16", sharding=rows)
        for size in (512, 1024)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    traced = jax.jit(gradient, out_shardings=whole).trace(G, x)
    text = traced.lower(lowering_platforms=(devices[0].platform,)).compile().as_text()
    return re.findall(r"= (\w+)\[512,1024\]\S* all-reduce(?:-start)?\(", text)


for name, devices in ("tpu", topology.devices), ("cpu", jax.devices("cpu")):
    for product, result in ("float32", "bfloat16"), ("bfloat16", "float32"):
        print(name, product, result, *collective(devices, product, result))
PYTHON
cat "$folder/found"
diff "$folder/found" - <<'EXPECTED'
tpu float32 bfloat16 bf16
tpu bfloat16 float32 bf16
cpu float32 bfloat16 f32
cpu bfloat16 float32 f32
EXPECTED
