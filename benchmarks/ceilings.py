"""The limits of this machine: the fastest product in each dtype, and a large copy."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import pytorch_program, pytorch_runs, pytorch_tensor
from benchmarks.timing import compiled, eager, interleaved

SHAPES = {"cpu": (2048, 1024, 1024)}  # rows, in, out: what is compared is timed there
LARGE = (8192, 8192, 8192)
COPIED_BYTES = 2**28


def ceilings(device, dtypes, seconds):
    """{dtype: {"flops_per_s", "by"}} and {"copy": {"bytes_per_s"}}.

    A product X W through every library that is installed, W (in, out) laid out as it
    likes it and the result left in the dtype of its choice: the best counts.
    """
    found = {}
    for dtype in dtypes:
        rows, in_features, out_features = SHAPES.get(device.platform, LARGE)
        x = np.ones((rows, in_features), jnp.dtype(dtype))
        weight = np.ones((in_features, out_features), jnp.dtype(dtype))
        programs = products(x, weight, dtype, device)
        samples = interleaved(programs, seconds)
        best = min(samples, key=lambda name: samples[name].min())
        found[dtype] = {
            "flops_per_s": 2 * x.size * out_features / samples[best].min(),
            "by": best,
        }
    values = jax.device_put(jnp.ones(COPIED_BYTES // 4, jnp.float32), device)
    copy = compiled(lambda values: values + 1, (values,))
    seconds_per_copy = interleaved({"copy": copy}, seconds)["copy"].min()
    found["copy"] = {"bytes_per_s": 2 * COPIED_BYTES / seconds_per_copy}
    return found


def products(x, weight, dtype, device):
    on_device = jax.device_put((x, weight), device)

    def product(result):
        return lambda x, w: jnp.matmul(x, w, preferred_element_type=result)

    programs = {
        f"JAX, {result} result": compiled(product(result), on_device)
        for result in {dtype, "float32"}
    }
    if dtype == "float32" and device.platform == "cpu":
        programs["NumPy"] = eager(lambda: x @ weight)
    if pytorch_runs(device, dtype):
        x_there, weight_there = (pytorch_tensor(a, device) for a in (x, weight))
        programs["PyTorch"] = pytorch_program(lambda: x_there @ weight_there, device)
    return programs
