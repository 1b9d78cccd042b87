"""Compile one case for a target and print a line of JSON for each contender.

    python -m benchmarks.aot.worker '{"target": "h100", "case": "layer-mixed-bias"}'

A process of its own, since a compiler may abort the one that it runs in.
"""

import json
import os
import sys
import time

from benchmarks.aot import targets

os.environ |= targets.SETTINGS

from benchmarks.aot import account, programs, sharded

BACKENDS = {"triton": None, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""Of the products on GPUs. A device chooses between them by timing."""


def main(cell):
    target, chips = cell["target"], cell.get("chips", 1)
    layout, is_tpu = cell.get("layout"), target in targets.TPUS
    devices = targets.devices(target, chips)
    if layout is None:
        devices, default = devices[:1], ["ours", "naive", "Flax"]
        backends = ["tpu"] if is_tpu else BACKENDS
    else:
        default = programs.CONTENDERS
        backends = ["tpu"] if is_tpu else ["triton"]
    for contender in cell.get("contenders", default):
        case = programs.Case.named(cell["case"], contender)
        if layout is None:
            step, arguments = programs.on_one(case, devices[0])
        else:
            sizes = sharded.Sizes(**cell.get("sizes", {}))
            axes = cell.get("axes", "auto")
            step, arguments = sharded.sharded(case, devices, layout, axes, sizes)
        platform = "tpu" if is_tpu else "cuda"
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))
        for backend in backends:
            begin = time.perf_counter()
            program = lowered.compile(compiler_options=BACKENDS.get(backend))
            seconds = time.perf_counter() - begin
            row = {"devices": len(devices), "backend": backend, "contender": contender}
            row |= figures(program) | {"compile_s": seconds}
            print(json.dumps(row), flush=True)


def figures(program):
    found, memory = account.account(program.as_text()), program.memory_analysis()
    return {
        "kernels": found.kernels,
        "flops": found.flops,
        "bytes": found.bytes,
        **{name: found.moves[name] for name in ("converts", "copies", "transposes")},
        "collectives": sorted([*key, size] for key, size in found.collectives.items()),
        "wire_bytes": found.wire,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
