"""Compile one case for a target, or time it here: a line of JSON for each contender.

    python -m benchmarks.aot.worker '{"target": "h100", "case": "layer-mixed-bias"}'

A process of its own, since a compiler may abort the one that it runs in.
"""

import itertools
import json
import os
import sys
import time

from benchmarks.aot import targets

os.environ |= targets.SETTINGS

from benchmarks.aot import (
    account,
    clipped,
    losses,
    programs,
    sharded,
    stacks,
    steps,
    timed,
)

BACKENDS = {"triton": None, "cublas": {"xla_gpu_enable_triton_gemm": False}}
"""Of the products on GPUs. A device chooses between them by timing."""


def main(cell):
    for row in timed_rows(cell) if "seconds" in cell else compiled(cell):
        print(json.dumps(row), flush=True)


def timed_rows(cell):
    program = programs.Case.named(cell["case"], None).program
    if program in losses.PROGRAMS:
        return losses.timed_rows(cell)
    if program in clipped.MODELS:
        return clipped.timed_rows(cell)
    return timed.rows(cell)


def compiled(cell):
    target, chips = cell["target"], cell.get("chips", 1)
    platform, devices = targets.platform(target), targets.devices(target, chips)
    if "layout" in cell:
        contenders, backends = programs.CONTENDERS, ["triton"]
    else:
        devices, contenders, backends = devices[:1], ["ours", "naive", "Flax"], BACKENDS
    contenders = cell.get("contenders", contenders)
    backends = cell.get("backends", backends) if platform == "cuda" else [platform]
    for contender, line in itertools.product(contenders, cell.get("lines", [None])):
        case = programs.Case.named(cell["case"], contender, line)
        step, arguments = program_of(case, cell, devices)
        lowered = step.trace(*arguments).lower(lowering_platforms=(platform,))
        for backend in backends:
            begin = time.perf_counter()
            program = lowered.compile(compiler_options=BACKENDS.get(backend))
            seconds = time.perf_counter() - begin
            row = {"devices": len(devices), "backend": backend, "contender": contender}
            row |= {"line": line} if line else {}
            yield row | figures(program) | {"compile_s": seconds}


def program_of(case, cell, devices):
    """The function of a case and its arguments."""
    layout, sizes = cell.get("layout"), cell.get("sizes", {})
    if "lines" in cell:
        return stacks.placed(case, devices, layout, stacks.Sizes(**sizes))
    if case.program in losses.PROGRAMS:
        return losses.placed(case, devices[0], losses.Sizes(**sizes))
    if case.program in clipped.MODELS:
        return clipped.placed(case, devices[0], clipped.Sizes(**sizes))
    if case.program == steps.PROGRAM:
        return steps.placed(case, devices[0], steps.Sizes(**sizes))
    if layout is None:
        return programs.on_one(case, devices[0])
    axes = cell.get("axes", "auto")
    return sharded.sharded(case, devices, layout, axes, sharded.Sizes(**sizes))


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
