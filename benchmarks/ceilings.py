"""The limits of this machine: the fastest product in each dtype, and a large copy."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

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
        programs["NumPy"] = eager(lambda: x @ weight, lambda: None)
    too_slow = device.platform == "cpu" and dtype == "float16"
    is_here = importlib.util.find_spec("torch") and device.platform in ("cpu", "gpu")
    if is_here and not too_slow:
        programs["PyTorch"] = _pytorch(x, weight, dtype, device)
    return programs


def _pytorch(x, weight, dtype, device):
    import torch

    place = "cuda" if device.platform == "gpu" else "cpu"

    def tensor(array):
        wide = torch.from_numpy(array.astype("float32"))
        return wide.to(place, getattr(torch, dtype))

    x, weight = tensor(x), tensor(weight)
    wait = torch.cuda.synchronize if place == "cuda" else lambda: None
    return eager(lambda: x @ weight, wait)
