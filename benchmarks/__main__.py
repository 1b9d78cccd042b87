"""Time the linear layer beside the naive formula and other libraries.

    python -m benchmarks [--quick] [--device cpu] [--only NAME] [--dtype NAME]

Every workload is a layer of a real model. Its forward pass, each gradient, and the
whole step are compiled ahead, checked against float64, and timed in turn with those of
each library that is installed. A row gives medians, quartiles, the median ratio of each
library's time to ours in the same round, and how far we are from the limit that the
fastest product and copy on this machine set. The results go to a JSON file and plots.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks import plots, report
from benchmarks.ceilings import ceilings
from benchmarks.contenders import (
    TRANSPOSED,
    jax_contenders,
    pytorch_programs,
    pytorch_runs,
)
from benchmarks.overhead import overhead
from benchmarks.timing import compiled, interleaved
from benchmarks.workloads import (
    DTYPES,
    GROWTH,
    MODES,
    QUICK,
    WORKLOADS,
    answers,
    problem,
    results_of,
    work,
)

LIBRARIES = ["jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy"]
PROGRESS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()


def main():
    # Else PyTorch's threads spin for a while after a call, and slow the next library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = parsed_options()
    console = Console()
    # Tables need their width where the terminal does not say its own.
    console.width = max(console.width, 100)
    old = json.loads(options.compare.read_text()) if options.compare else None
    device = jax.devices(options.device)[0]
    cells = chosen_cells(options)
    if not cells:
        raise SystemExit(f"benchmarks: no workload has a name with {options.only}")
    seconds = 0.1 if options.quick else 0.2  # for each program, in rounds
    document = describe(device)
    with jax.default_device(device), Progress(*PROGRESS, console=console) as progress:
        task = progress.add_task("ceilings", total=len(cells) + 2)
        computed = dict.fromkeys(DTYPES[dtype][0] for _, dtype, _ in cells)
        document["ceilings"] = ceilings(device, computed, 4 * seconds)
        progress.update(task, advance=1, description="overhead")
        document["overhead"] = overhead(options.quick)
        document["results"] = []
        for workload, dtype, modes in cells:
            progress.update(task, advance=1, description=f"{workload.name}, {dtype}")
            document["results"] += measure(
                workload, dtype, modes, device, seconds, document["ceilings"]
            )
        progress.update(task, advance=1, description="done")
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.json"
    results.write_text(json.dumps(document, indent=1) + "\n")
    for table in report.tables(document):
        console.print(table)
    for path in [results, *plots.draw(document, options.output)]:
        console.print(f"written: {path}")
    if old is not None:
        regressions = report.regressions(old, document)
        console.print(regressions or "No regression.")
        raise SystemExit(1 if regressions else 0)


def parsed_options():
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="three workloads, the whole step only")
    add("--device", choices=["cpu", "gpu", "tpu"], help="default: JAX's default")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="workloads with this in their name; may be repeated",
    )
    add("--dtype", action="append", choices=list(DTYPES), help="may be repeated")
    add("--mode", action="append", choices=list(MODES), help="may be repeated")
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("benchmark-results"),
        metavar="DIR",
        help="where results.json and the plots go",
    )
    add(
        "--compare",
        type=pathlib.Path,
        metavar="OLD.json",
        help="show regressions against earlier results; exit status 1 if there are any",
    )
    return parser.parse_args()


def chosen_cells(options):
    """(workload, dtype, modes) of all that is to be timed."""
    modes = options.mode or (["step"] if options.quick else list(MODES))
    dtypes = options.dtype or list(DTYPES)
    quick = options.quick and not options.only

    def is_chosen(workload):
        if quick:
            return workload.name in QUICK
        return not options.only or any(name in workload.name for name in options.only)

    cells = [(w, d, modes) for w in WORKLOADS if is_chosen(w) for d in dtypes]
    grown = [(w, d, ["step"]) for w in GROWTH if is_chosen(w) for d in dtypes]
    return cells + [cell for cell in grown if "step" in modes]


def describe(device):
    """Where and with what it ran."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    is_cpu = device.platform == "cpu"
    name = f"CPU, {os.cpu_count()} cores" if is_cpu else device.device_kind
    return {
        "device": name,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions,
    }


def measure(workload, dtype, modes, device, seconds, limits):
    """The rows of one workload in one dtype."""
    arrays = problem(workload, dtype)
    compute_dtype = DTYPES[dtype][0]
    exact = answers(arrays, dtype)
    rows = []
    for mode in modes:
        programs = programs_of(workload, mode, arrays, compute_dtype, device)
        errors = {
            name: error_of(program, mode, exact, name in TRANSPOSED)
            for name, program in programs.items()
        }
        # Half of the digits: the naive sum of 65 536 rows in low precision has few.
        if errors["jaxlinear"] > jnp.finfo(compute_dtype).eps ** 0.5:
            raise ArithmeticError(f"{workload}, {dtype}, {mode}: wrong, {errors}")
        samples = interleaved(programs, seconds)
        flops, least_bytes = work(workload, mode, arrays)
        limit = max(
            flops / limits[compute_dtype]["flops_per_s"],
            least_bytes / limits["copy"]["bytes_per_s"],
        )
        for name, times in samples.items():
            low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
            ratios = np.quantile(times / samples["jaxlinear"], [0.25, 0.5, 0.75])
            rows.append(
                {
                    "workload": workload.name,
                    "rows": workload.rows,
                    "in": workload.in_features,
                    "out": workload.out_features,
                    "dtype": dtype,
                    "compute_dtype": compute_dtype,
                    "mode": mode,
                    "library": name,
                    "median_s": median,
                    "low_s": low,
                    "high_s": high,
                    "rounds": len(times),
                    "ratio_low": ratios[0],
                    "ratio": ratios[1],
                    "ratio_high": ratios[2],
                    "flops_per_s": flops / median,
                    "bytes_per_s": least_bytes / median,
                    "least_bytes": least_bytes,
                    "share_of_limit": limit / median,
                    "relative_error": errors[name],
                    "peak_bytes": programs[name].peak_bytes,
                    "compile_s": programs[name].compile_s,
                }
            )
    return rows


def programs_of(workload, mode, arrays, dtype, device):
    x, weight, bias, cotangent = jax.device_put(arrays, device)
    layers = jax_contenders()
    if workload in GROWTH:  # A curve of ours and one of the naive formula.
        layers = {name: layers[name] for name in ("jaxlinear", "naive formula")}
    programs = {}
    for name, layer in layers.items():
        apply, parameters = layer(weight, bias, dtype)
        programs[name] = compiled(results_of(mode, apply), (parameters, x, cotangent))
    if workload not in GROWTH and pytorch_runs(device, dtype):
        programs["PyTorch"] = pytorch_programs(arrays, dtype, device)[mode]
    return programs


def error_of(program, mode, exact, transposed):
    """The largest relative error of the results, in the Frobenius norm."""
    errors = []
    for name, result in zip(MODES[mode], program.call(), strict=True):
        if not isinstance(result, jax.Array):  # of PyTorch
            result = result.detach().float().cpu()
        result, expected = np.asarray(result, np.float64), exact[name]
        if name == "grad_W" and transposed:
            result = result.T
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        errors.append(float(error))
    return max(errors)


if __name__ == "__main__":
    main()
