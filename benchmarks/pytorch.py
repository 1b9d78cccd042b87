"""The layer in eager PyTorch, in a process of its own.

After a call PyTorch's threads go on spinning for a while: they would slow the program
that this process runs next. So the other process answers when its threads sleep, and
is asked when those of this process do.
"""

import atexit
import concurrent.futures
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

from benchmarks.device_clock import device_clock
from benchmarks.peers import is_installed
from benchmarks.timing import Program, wall_clock

LONGEST_WAIT = 1.0
"""Seconds: threads that spin for longer are not waited for."""

VERBOSE = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
PRODUCTS = """
import torch
for dtype in (torch.float32, torch.bfloat16):
    a = torch.ones(64, 64, dtype=dtype)
    a @ a
print("threads", torch.get_num_threads())
"""
INSTRUCTIONS = {
    "float32": r"^MKL_VERBOSE oneMKL .*? architecture (.*?),? (?:Lnx|Win|Mac)",
    "bfloat16": r"^onednn_verbose.*,cpu,isa:(.*)",
}


def is_timed(device, dtype):
    """Whether PyTorch is here and worth the wait.

    On CPU it takes a second for what takes the others a fiftieth in float16.
    """
    too_slow = device.platform == "cpu" and dtype == "float16"
    return is_installed("torch") and device.platform in ("cpu", "gpu") and not too_slow


def layer(arrays, dtype, device):
    """{mode: program} of the layer with these NumPy arrays: x, W, B and G."""
    return _programs(_layer, arrays, dtype, _place(device))


def product(x, weight, device):
    """The program of X W, with W (in, out)."""
    return _programs(_product, (x, weight), _place(device))["product"]


def described():
    """The threads of PyTorch on a CPU, and the instructions of its products.

    They are what its libraries say, which choose by the maker of the CPU as well.
    """
    run = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env=os.environ | VERBOSE,
        capture_output=True,
        text=True,
        check=True,
    )
    patterns = {"threads": r"^threads (\d+)"} | INSTRUCTIONS
    found = {k: re.search(p, run.stdout, re.MULTILINE) for k, p in patterns.items()}
    return {name: match and match[1] for name, match in found.items()}


def _place(device):
    return "cuda" if device.platform == "gpu" else "cpu"


@functools.cache
def _process():
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(1, context, _end_with_the_other)
    atexit.register(executor.shutdown)
    return executor


def _ask(function, *arguments):
    wait_until_idle()
    return _process().submit(function, *arguments).result()


def wait_until_idle():
    """Wait until the threads of this process sleep."""
    end = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(5e-3)
        if time.process_time() - before < 5e-4:
            return


def _programs(load, *arguments):
    return {
        name: Program(
            call=functools.partial(_ask, _results, name),
            seconds=functools.partial(_ask, _seconds, name),
        )
        for name in _ask(load, *arguments)
    }


# What follows runs in the other process.

_loaded = {}
"""The programs of what was loaded last, by name."""


def _end_with_the_other():
    """End when the process that asks does, also if it was killed."""

    def wait():
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _results(name):
    """As NumPy's arrays, which know no bfloat16."""
    return [result.detach().float().cpu().numpy() for result in _loaded[name].call()]


def _seconds(name, times):
    seconds = _loaded[name].seconds(times)
    wait_until_idle()
    return seconds


def _load(calls, place):
    """Keep the calls, which wait for the device, and return their names."""
    import torch

    def waiting(call):
        def wait():
            results = call()
            torch.cuda.synchronize()
            return results

        return wait

    _loaded.clear()
    for name, call in calls.items():
        call = call if place == "cpu" else waiting(call)
        _loaded[name] = Program(call, _clock(call, place))
    return [*calls]


def _clock(call, place):
    if place == "cpu":
        return wall_clock(call)
    # JAX starts on the GPU here as well, to record what PyTorch runs there. It has
    # nothing to run itself, so it must not take most of the memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return device_clock(call, "/device:GPU:0")  # PyTorch's "cuda".


def _tensor(array, place):
    """A NumPy array, of bfloat16 too, as a tensor."""
    import torch

    wide = torch.from_numpy(array.astype("float32"))  # It reads no bfloat16.
    return wide.to(place, getattr(torch, array.dtype.name))


def _product(arrays, place):
    x, weight = (_tensor(array, place) for array in arrays)
    return _load({"product": lambda: [x @ weight]}, place)


def _layer(arrays, dtype, place):
    """The calls of each mode; the gradients without the forward pass."""
    import torch
    from torch.nn.functional import linear

    tensors = (_tensor(array, place).requires_grad_() for array in arrays)
    x, weight, bias, cotangent = tensors
    compute_dtype = getattr(torch, dtype)
    mixed = weight.dtype != compute_dtype

    def forward():
        with torch.autocast(x.device.type, compute_dtype, enabled=mixed):
            return linear(x, weight, bias)

    kept = forward()

    def gradient(of):
        grads = torch.autograd.grad(kept, of, cotangent, retain_graph=True)
        return list(grads)

    def without_graph():
        with torch.no_grad():
            return [forward()]

    def step():
        Y = forward()
        return [Y, *torch.autograd.grad(Y, (x, weight, bias), cotangent)]

    calls = {
        "forward": without_graph,
        "input gradient": lambda: gradient(x),
        "weight gradient": lambda: gradient(weight),
        "bias gradient": lambda: gradient(bias),
        "step": step,
    }
    return _load(calls, place)
