"""Compiled for eight TPUs that are not here: in which dtype they add gradients."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# In a process of its own: the compiler may end the one that it runs in.
PROGRAM = """
import json
import jax
import jaxlinear
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

def sharded(shape, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)

arguments = sharded((512, 256), "data"), sharded((128, 256)), sharded((128,))
found = jaxlinear.explain(jaxlinear.linear, *arguments)
print(json.dumps([[c.kind, c.dtype, c.bytes] for c in found.collectives]))
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_tpus_add_a_bfloat16_bias_gradient_in_float32():
    settings = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert ["all-reduce", "float32", 128 * 4] in json.loads(result.stdout)
