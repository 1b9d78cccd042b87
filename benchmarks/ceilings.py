"""The limits of this machine: the fastest product in each dtype, and copies."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pytorch
from benchmarks.timing import compiled, eager, interleaved

SHAPES = {"cpu": [(2048, 1024, 1024), (2048, 4096, 1024)]}  # rows, in, out
LARGE = [(8192, 8192, 8192)]
COPIED_BYTES = [2**k for k in range(18, 30, 2)]
"""Read or written: what fits into a cache is copied faster."""


def ceilings(device, dtypes, seconds):
    """{dtype: {"flops_per_s", "by"}} and {"copy": {"bytes", "bytes_per_s"}}.

    A product X W through every library that is installed, W (in, out) laid out as it
    likes it and the result left in the dtype of its choice: the best counts.
    """
    found = {}
    for dtype in dtypes:
        speeds = {}
        for rows, in_features, out_features in SHAPES.get(device.platform, LARGE):
            x = np.ones((rows, in_features), jnp.dtype(dtype))
            weight = np.ones((in_features, out_features), jnp.dtype(dtype))
            samples = interleaved(products(x, weight, dtype, device), seconds)
            for name, times in samples.items():
                speeds[2 * x.size * out_features / times.min()] = name
        found[dtype] = {"flops_per_s": max(speeds), "by": speeds[max(speeds)]}
    speeds = [size / seconds_of_copy(size, device, seconds) for size in COPIED_BYTES]
    found["copy"] = {"bytes": COPIED_BYTES, "bytes_per_s": speeds}
    return found


def seconds_of_copy(copied, device, seconds):
    values = jax.device_put(jnp.ones(copied // 8, jnp.float32), device)
    copy = compiled(lambda values: values + 1, (values,))
    return interleaved({"copy": copy}, seconds)["copy"].min()


def copy_speed(limits, count):
    """Bytes per second of the fastest copy of a fourth of ``count`` bytes or more."""
    sizes, speeds = limits["copy"]["bytes"], limits["copy"]["bytes_per_s"]
    count = min(count, sizes[-1])
    return max(s for size, s in zip(sizes, speeds, strict=True) if 4 * size >= count)


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
    if pytorch.is_timed(device, dtype):
        programs["PyTorch"] = pytorch.product(x, weight, device)
    return programs
