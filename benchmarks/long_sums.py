"""Long sums in float32: what summing in blocks gains in accuracy, and what it costs.

    python -m benchmarks.long_sums [--errors]

XLA's product of float32 operands on this CPU, beside sums of 256 terms each that are
added in a loop, or written out. Errors are against float64, also that of PyTorch if it
is installed; times are to XLA's in the same round. With `--errors` nothing is timed.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import pytorch
from benchmarks.checks import as_float64, relative_error
from benchmarks.machine import describe, place, stamped
from benchmarks.timing import compiled, interleaved, ratios
from jaxlinear.inspect._table import table

TERMS = 256
SHAPES = [(rows, 4096, 1024) for rows in (1, 16, 128, 512, 2048)]
SHAPES += [(rows, 1024, 4096) for rows in (16, 128, 2048)]
"""Rows, terms of each sum, columns."""

SECONDS = 5
PYTORCH = "PyTorch"


def plain(X, W):
    return X @ W.T


def written_out(X, W):
    parts = zip(*(jnp.split(a, a.shape[1] // TERMS, 1) for a in (X, W)), strict=True)
    return functools.reduce(jnp.add, (plain(*part) for part in parts))


def in_a_loop(X, W):
    def add(k, Y):
        return Y + plain(
            *(lax.dynamic_slice_in_dim(a, k * TERMS, TERMS, 1) for a in (X, W))
        )

    start = jnp.zeros((len(X), len(W)), X.dtype)
    return lax.fori_loop(0, X.shape[1] // TERMS, add, start)


OTHERS = {"in a loop": in_a_loop, "written out": written_out}
FORMS = {"XLA": plain, **OTHERS}


def row(shape, device, is_timed):
    """The error of each form, its time to XLA's, and its temporaries."""
    rows, terms, columns = shape
    generator = np.random.default_rng(0)
    X, W = (generator.standard_normal((n, terms), np.float32) for n in (rows, columns))
    exact = as_float64(X) @ as_float64(W).T
    on_device = jax.device_put((X, W), device)
    programs = {name: compiled(form, on_device) for name, form in FORMS.items()}
    results = {name: program.call() for name, program in programs.items()}
    if pytorch.is_timed(device, "float32"):
        [results[PYTORCH]] = pytorch.product(X, W.T.copy(), device).call()
    cells = [
        f"{relative_error(as_float64(results[name]), exact):.1e}"
        if name in results
        else ""
        for name in (*FORMS, PYTORCH)
    ]
    if is_timed:
        samples = interleaved(programs, SECONDS)
        found = (ratios(samples[name], samples["XLA"]) for name in OTHERS)
        cells += [f"{np.median(ratio):.2f}" for ratio in found]
    sizes = [programs[name].temporary_bytes or 0 for name in OTHERS]
    cells += [f"{size / 2**20:,.0f}" for size in sizes]
    return [f"{rows} × {terms} → {columns}", *cells]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_sums",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--errors", action="store_true", help="time nothing")
    is_timed = not parser.parse_args().errors
    device = jax.devices("cpu")[0]
    document = describe(device)
    heading = ["rows × terms → columns", *(f"error: {n}" for n in (*FORMS, PYTORCH))]
    heading += [f"time / XLA: {n}" for n in OTHERS] if is_timed else []
    heading += [f"MiB: {n}" for n in OTHERS]
    jax_version = document["versions"]["jax"]
    print(f"{place(document)}, JAX {jax_version}, measured {stamped(document)}:\n")
    print(table(heading, [row(shape, device, is_timed) for shape in SHAPES]))


if __name__ == "__main__":
    main()
