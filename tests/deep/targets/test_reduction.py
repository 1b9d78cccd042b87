"""Compiled for eight TPUs that are not here: in which dtype they add gradients."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.aot.targets import SETTINGS

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu"
)

# In a process of its own: the compiler may end the one that it runs in.
PROGRAM = """
import functools, json
import jax
import jaxlinear
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

def sharded(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

weight_grad = jaxlinear.Product(preferred_element_type={preferred!r})
products = jaxlinear.Products(weight_grad=weight_grad)
products = {recipe} or products
layer = functools.partial(jaxlinear.linear, dtype="bfloat16", products=products)
x = sharded((512, 256), "bfloat16", *{x_spec!r})
parameters = [sharded(shape, {param_dtype!r}, *{spec!r}) for shape in {shapes!r}]
found = jaxlinear.explain(layer, x, *parameters)
print(json.dumps([[c.kind, c.dtype, c.bytes] for c in found.collectives]))
"""


def collectives(
    shapes, param_dtype, preferred=None, recipe=None, x_spec=("data",), spec=()
):
    """[kind, dtype, bytes] of those of a layer whose parameters have the shapes."""
    program = PROGRAM.format(**locals())
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_tpus_add_a_bfloat16_bias_gradient_in_float32():
    found = collectives([(128, 256), (128,)], "bfloat16")
    assert ["all-reduce", "float32", 128 * 4] in found


@pytest.mark.parametrize("preferred", [None, "bfloat16"])
def test_bytes_that_tpus_send_for_a_weight_gradient(preferred):
    dtype, size = ("bfloat16", 2) if preferred else ("float32", 4)
    found = collectives([(128, 256)], "float32", preferred)
    assert found == [["all-reduce", dtype, 128 * 256 * size]]


@pytest.mark.parametrize(
    ("x_spec", "spec"),
    [(("data",), ("data",)), ((), ("data",))],
    ids=["fsdp", "column"],
)
def test_float8_adds_four_bytes_for_each_maximum_and_gathers_half(x_spec, spec):
    case = {"x_spec": x_spec, "spec": spec}
    theirs = collectives([(128, 256)], "float32", **case)
    ours = collectives([(128, 256)], "float32", recipe="jaxlinear.FLOAT8", **case)

    def of(found, kind):
        return sum(size for k, _, size in found if k == kind)

    maxima = of(ours, "all-reduce") - of(theirs, "all-reduce")
    assert maxima in (4, 8, 12)
    assert of(ours, "all-gather") == of(theirs, "all-gather") / 2
