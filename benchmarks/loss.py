"""The loss of a last layer without its logits, beside the loss with them.

    python -m benchmarks.loss [--compiled] [--gpt] [--times]

The loss of our layer's float32 logits, the naive formula with Optax's loss, ours with
``reduction="mean"``, ours per token, and tokamax's ``chunked_xla``, in float32 and with
float32 weights under bfloat16 products. They are compiled for an H100, a TPU v5e and
this CPU, and timed on this CPU; then the memory on this CPU is compiled against the
vocabulary, and a training step of the benchmarks' GPT with its logits and without.
`--compiled`, `--gpt` and `--times` measure only this part again. It writes
`benchmarks/results/loss.json`, and `python -m benchmarks.pages` writes the rest.

It needs `pip install -e '.[aot]'`, and `pip install tokamax==0.0.17` for the rows of
tokamax, whose defaults for a device that it does not know are used on each target.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib

import jax
from rich.console import Console

from benchmarks import drawing, results_file
from benchmarks.aot import plots
from benchmarks.aot.__main__ import rows_of_all
from benchmarks.aot.kept import TARGETS, memory, memory_of
from benchmarks.aot.steps import PROGRAM, Sizes
from benchmarks.machine import ROOT, describe, place, stamped
from benchmarks.model import GPT_STEP, WITH_LOSS
from benchmarks.results_file import OURS
from jaxlinear.inspect._table import table

RESULTS = ROOT / "benchmarks" / "results" / "loss.json"
CONTENDERS = {
    "unfused": "unfused",
    "naive": "naive formula",
    "ours": "ours, mean",
    "ours, per token": "ours, per token",
    "tokamax": "tokamax",
}
PROGRAMS = {"loss": "and gradient", "loss_value": "only"}
DTYPES = ["float32", "mixed"]
SMALL = {"rows": 4096, "width": 512, "classes": 32768}
LARGE = {"rows": 8192, "width": 1024, "classes": 131072}
VOCABULARIES = [2**k for k in range(13, 19)]
DRAWN = ["unfused", "ours", "ours, per token"]
"""Against the vocabulary."""

STEPS = [
    {"batch": GPT_STEP.batch, "classes": GPT_STEP.out_features},
    {"batch": 32, "classes": 32768},
]
"""Of the GPT: as it is timed, and where the logits are most of the memory."""

TIMED = ["CPU: s", "time / unfused", "error: loss", "error: ∇W"]
SECONDS = 30
"""Of a program, in rounds, at most."""


def is_installed(contender):
    return contender != "tokamax" or importlib.util.find_spec("tokamax") is not None


def cell(target, program, dtype, **more):
    return {
        "target": target,
        "chips": 1,
        "case": f"{program}-{dtype}-plain",
        "backends": ["triton"],  # Of a GPU.
        "sizes": SMALL,
        "contenders": [*filter(is_installed, CONTENDERS)],
        **more,
    }


def cells():
    keys = itertools.product((SMALL, LARGE), TARGETS, PROGRAMS, DTYPES)
    for sizes, target, program, dtype in keys:
        yield cell(target, program, dtype, sizes=sizes)
    for dtype, classes in itertools.product(DTYPES, VOCABULARIES):
        yield cell("cpu", "loss", dtype, sizes=of_vocabulary(classes), contenders=DRAWN)


def of_vocabulary(classes):
    return {"rows": 2048, "width": 512, "classes": classes}


def gpt_cells():
    """On accelerators only in mixed precision: a compiler takes a minute or two."""
    for target, sizes, dtype in itertools.product(TARGETS, STEPS, DTYPES):
        if target == "cpu" or dtype == "mixed":
            more = {"sizes": sizes, "contenders": [OURS, WITH_LOSS]}
            yield cell(target, PROGRAM, dtype, **more)


def timed_cells():
    for program, dtype in itertools.product(PROGRAMS, DTYPES):
        yield cell("cpu", program, dtype, seconds=SECONDS)


def chosen(rows, program, dtype, **fields):
    """The rows of a program that have these fields."""
    fields["case"] = f"{program}-{dtype}-plain"
    return [r for r in rows if all(r[name] == value for name, value in fields.items())]


# The tables.


def tables(document):
    """The generated parts of the page, by name."""
    return {
        "loss": f"{caption(document)}\n\n{of_sizes(document, SMALL)}",
        "loss-large": of_sizes(document, LARGE),
        "loss-memory": against_vocabulary(document["rows"]),
        "loss-gpt": of_gpt(document),
    }


def caption(document):
    versions = document["versions"]
    names = {"jax": "JAX", "optax": "Optax", "tokamax": "tokamax"}
    found = [f"{names[name]} {versions[name]}" for name in names if name in versions]
    text = f"Compiled {stamped(document)} with {', '.join(found)}. {place(document)}"
    if "timed" in document:
        timed = document["timed"]
        text += f", timed {stamped(timed)} on {place(timed)}"
    return f"{text}:"


def of_sizes(document, sizes):
    """A line for each contender, program and dtype, with times if there are any."""
    times = [row for row in document.get("times", []) if row["sizes"] == sizes]
    heading = ["loss", "dtype", "contender", *map(memory_of, TARGETS.values())]
    heading += ["products, Gflop", *(TIMED if times else [])]
    lines = []
    for program, dtype, contender in itertools.product(PROGRAMS, DTYPES, CONTENDERS):
        fields = {"contender": contender, "sizes": sizes}
        rows = chosen(document["rows"], program, dtype, **fields)
        if not rows:
            continue
        rows.sort(key=lambda row: [*TARGETS].index(row["target"]))
        flops = dict.fromkeys(f"{row['flops'] / 1e9:,.0f}" for row in rows)
        line = [PROGRAMS[program], dtype, CONTENDERS[contender]]
        line += [*map(memory, rows), " / ".join(flops)]
        line += timed_part(chosen(times, program, dtype, **fields)) if times else []
        lines.append(line)
    return table(heading, lines)


def timed_part(times):
    """What is under ``TIMED``, of one row or none."""
    if not times:
        return [""] * len(TIMED)
    [time] = times
    errors = time["errors"]
    of_results = (f"{errors[n]:.0e}" if n in errors else "" for n in ("loss", "grad_W"))
    return [f"{time['median_s']:.2f}", f"{time['to unfused']:.2f}", *of_results]


def against_vocabulary(rows):
    """The temporaries of this CPU, in MiB."""
    keys = [*itertools.product(DTYPES, DRAWN)]
    heading = ["classes", "logits"]
    heading += [f"{CONTENDERS[contender]}, {dtype}" for dtype, contender in keys]
    lines = []
    for classes in VOCABULARIES:
        logits = 4 * of_vocabulary(classes)["rows"] * classes
        found = [*itertools.chain(*(of_memory(rows, *key, classes) for key in keys))]
        sizes = [logits, *(row["temporary_bytes"] for row in found)]
        lines.append([f"{classes:,}", *(f"{size / 2**20:,.0f}" for size in sizes)])
    return table(heading, lines)


def of_gpt(document):
    """The temporaries of a step, with the logits and without."""
    heading = ["GPT step", "dtype", "rows", "classes", "logits", "with", "without"]
    lines = []
    for gpt_cell in gpt_cells():
        target, case, sizes = (gpt_cell[k] for k in ("target", "case", "sizes"))
        gpt, dtype = Sizes(**sizes).gpt, case.split("-")[1]
        rows = chosen(document["gpt"], PROGRAM, dtype, target=target, sizes=sizes)
        found = {row["contender"]: row["temporary_bytes"] for row in rows}
        if not found:
            continue
        logits = 4 * gpt.rows * gpt.out_features
        line = [TARGETS[target], dtype, f"{gpt.rows:,}", f"{gpt.out_features:,}"]
        of_memory = logits, found[OURS], found[WITH_LOSS]
        lines.append([*line, *(f"{size / 2**20:,.0f}" for size in of_memory)])
    machine = document["gpt compiled"]
    jax_version = machine["versions"]["jax"]
    return (
        f"Compiled {stamped(machine)} with JAX {jax_version}. {place(machine)}:"
        f"\n\n{table(heading, lines)}"
    )


def of_memory(rows, dtype, contender, classes):
    fields = {"target": "cpu", "contender": contender, "sizes": of_vocabulary(classes)}
    return chosen(rows, "loss", dtype, **fields)


# The picture.


def panels(rows):
    """The temporaries of each contender against the vocabulary, by dtype."""
    return {
        dtype: {
            CONTENDERS[contender]: [
                (classes, row["temporary_bytes"])
                for classes in VOCABULARIES
                for row in of_memory(rows, dtype, contender, classes)
            ]
            for contender in DRAWN
        }
        for dtype in DTYPES
    }


def draw(document, folder):
    lines = panels(document["rows"])
    drawing.save(folder / "loss-vocabulary.png", plots.against_vocabulary, lines)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compiled", action="store_true", help="only compile")
    only.add_argument("--gpt", action="store_true", help="only the step of a GPT")
    only.add_argument("--times", action="store_true", help="only the times")
    options = parser.parse_args()
    console, folder = Console(), pathlib.Path("aot_results") / "loss"
    if not is_installed("tokamax"):
        console.print("tokamax is not installed: there are no rows of it.")
    here = describe(jax.devices("cpu")[0])
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    is_all = not (options.compiled or options.gpt or options.times)
    if is_all or options.compiled:
        document |= here | {"rows": rows_of_all(cells(), folder / "compiled", console)}
    if is_all or options.gpt:
        rows = rows_of_all(gpt_cells(), folder / "gpt", console)
        document |= {"gpt compiled": here, "gpt": rows}
    if is_all or options.times:
        times = rows_of_all(timed_cells(), folder / "timed", console)
        document |= {"timed": here, "times": times}
    results_file.write(document, RESULTS)


if __name__ == "__main__":
    main()
