"""The example program ``examples/tensor_parallel.py`` notices a broken layer."""

import pytest
from test_tensor_parallel import PROGRAM, run

RUN = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"

# name: what breaks the layer, and what the program then says
BROKEN = {
    "weight gradient one percent too large": (
        "import jaxlinear._linear as m; right = m.weight_gradient\n"
        "m.weight_gradient = lambda *a: right(*a) * 1.01\n",
        "loss off by",
    ),
    "bias gradient of the first image alone": (
        "import jaxlinear._linear as m\nm.bias_gradient = lambda G, _: G[0]\n",
        "the devices send {",
    ),
    "weight gathered on every device": (
        "import jax, jaxlinear._linear as m; right = m.forward_product\n"
        "whole = jax.sharding.PartitionSpec()\n"
        "gather = lambda W: jax.lax.with_sharding_constraint(W, whole)\n"
        "m.forward_product = lambda X, W, *a: right(X, gather(W), *a)\n",
        "a device makes a whole weight, of shape [128,64]",
    ),
    "parameters without their metadata": (
        "import jaxlinear.nnx as m; right = m.Linear.__init__\n"
        "def init(*args, kernel_metadata, bias_metadata=None, **kwargs):\n"
        "    right(*args, **kwargs)\n"
        "m.Linear.__init__ = init\n",
        "of column.bias, expected (32,)",
    ),
}


@pytest.mark.parametrize(("patch", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_layer_makes_the_program_fail(patch, message):
    result = run("-c", f"{patch}\n{RUN}")
    assert result.returncode == 1
    assert result.stderr.startswith("tensor_parallel.py: check failed: ")
    assert message in result.stderr
