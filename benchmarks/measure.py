"""One cell: its programs are checked, timed in turn, and become rows."""

from functools import partial

import jax

from benchmarks import pytorch
from benchmarks.ceilings import copy_speed
from benchmarks.checks import checked_errors
from benchmarks.machine import Load
from benchmarks.model import GPT, model_programs
from benchmarks.peers import TRANSPOSED, jax_peers, parameters_of
from benchmarks.results_file import AGAIN, NAIVE, OURS, Row, figures
from benchmarks.timing import compiled, interleaved
from benchmarks.workloads import (
    DTYPES,
    GROWTH,
    MODES,
    RECIPES,
    answers,
    problem,
    results_of,
    work,
)


def measure(workload, dtype, modes, device, seconds, limits):
    """Yield the rows of one workload in one dtype, mode by mode."""
    compute_dtype = DTYPES[dtype][0]
    if isinstance(workload, GPT):
        checked = model_programs(workload, dtype, compute_dtype, device)
        # A step that takes seconds should have a few rounds as well.
        yield timed(workload, dtype, "step", checked, 5 * seconds, limits)
        return
    arrays = problem(workload, dtype)
    exact = answers(arrays, dtype)
    of_pytorch = {}
    if workload not in GROWTH and pytorch.is_timed(device, compute_dtype):
        of_pytorch = {"PyTorch": pytorch.layer(arrays, compute_dtype, device)}
    for mode in modes:
        programs = programs_of(workload, mode, arrays, dtype, device)
        programs |= {name: found[mode] for name, found in of_pytorch.items()}
        errors = {}
        for name, program in programs.items():
            found = checked_errors(
                (workload.name, dtype, mode),
                name,
                dict(zip(MODES[mode], program.call(), strict=True)),
                exact,
                compute_dtype,
                device,
                name in TRANSPOSED,
            )
            errors[name] = max(found.values())
        checked = programs, errors, *work(workload, mode, arrays)
        yield timed(workload, dtype, mode, checked, seconds, limits)


def timed(workload, dtype, mode, checked, seconds, limits):
    programs, errors, flops, least_bytes = checked
    compute_dtype = DTYPES[dtype][0]
    limit = max(
        flops / limits[compute_dtype]["flops_per_s"],
        least_bytes / copy_speed(limits, least_bytes),
    )
    load = Load()
    samples = interleaved(programs, seconds)
    others_cores = load.of_others()
    rows = []
    for name, program in programs.items():
        found = figures(samples, name)
        row = Row(
            workload=workload.name,
            rows=workload.rows,
            in_features=workload.in_features,
            out_features=workload.out_features,
            dtype=dtype,
            compute_dtype=compute_dtype,
            mode=mode,
            library=name,
            flops_per_s=flops / found["median_s"],
            bytes_per_s=least_bytes / found["median_s"],
            least_bytes=least_bytes,
            share_of_limit=limit / found["median_s"],
            relative_error=errors[name],
            peak_bytes=program.peak_bytes,
            temporary_bytes=program.temporary_bytes,
            kept_bytes=program.kept_bytes,
            compile_s=program.compile_s,
            loss=program.loss,
            others_cores=others_cores,
            **found,
        )
        rows.append(row)
    return rows


def programs_of(workload, mode, arrays, dtype_name, device):
    x, weight, bias, cotangent = jax.device_put(arrays, device)
    layers, dtype = jax_peers(), DTYPES[dtype_name][0]
    if dtype_name in RECIPES:
        layers[OURS] = partial(layers[OURS], products=RECIPES[dtype_name])
    if workload in GROWTH:  # A curve of ours and one of the naive formula.
        layers = {name: layers[name] for name in (OURS, NAIVE, AGAIN)}
    programs = {}
    for name, layer in layers.items():
        apply = partial(layer, dtype=dtype)
        parameters = parameters_of(name, weight, bias)
        programs[name] = compiled(results_of(mode, apply), (parameters, x, cotangent))
        programs[name].kept_bytes = kept_bytes(apply, parameters, x)
    return programs


def kept_bytes(apply, parameters, x):
    """The bytes that ``jax.vjp`` keeps for the backward pass."""

    def kept(parameters, x):
        return jax.tree.leaves(jax.vjp(apply, parameters, x)[1])

    return sum(a.size * a.dtype.itemsize for a in jax.eval_shape(kept, parameters, x))
