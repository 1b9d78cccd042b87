"""Clipped gradients of single examples beside jax-privacy's and the plain gradient.

    python -m benchmarks.examples [--compiled] [--times]

Four models, 128 examples: a stack of layers of one vector or of 64 tokens for each
example, written out or under `lax.scan`, and a small GPT. The gradient of the mean
loss, the norms, our clipped gradient in one pass and in two, and jax-privacy's, of all
examples at once and of the largest microbatch that needs no more memory than ours.
They are compiled for an H100, a TPU v5e and this CPU, and timed on this CPU; then the
memory on this CPU is compiled against the examples, their tokens and the layers.
`--compiled` and `--times` measure only this part again. It writes
`benchmarks/results/examples.json`, and `python -m benchmarks.pages` writes the rest.

It needs `pip install -e '.[aot]' jax-privacy==2.0.0`.
"""

import argparse
import itertools
import json
import math
import pathlib
from typing import Any

import jax
from rich.console import Console

from benchmarks import drawing, results_file
from benchmarks.aot import clipped, plots
from benchmarks.aot.__main__ import rows_of_all
from benchmarks.aot.kept import TARGETS, memory, memory_of
from benchmarks.aot.programs import Case
from benchmarks.machine import ROOT, describe, place, stamped
from jaxlinear.inspect._table import table

RESULTS = ROOT / "benchmarks" / "results" / "examples.json"
CONTENDERS = {
    "plain": "mean gradient, not clipped",
    "norms": "norms",
    "one pass": "ours, one pass",
    "two passes": "ours, two passes",
    "jax-privacy": "jax-privacy",
}
MODELS = {
    "vectors": {"batch": 128, "width": 1024, "layers": 3},
    "sequences": {"batch": 128, "tokens": 64, "width": 512, "layers": 4},
    "scanned": {"batch": 128, "tokens": 64, "width": 512, "layers": 4},
    "small_gpt": {"batch": 128, "tokens": 64, "width": 256, "layers": 4},
}
NAMES = {
    "vectors": "3 layers of 1024 × 1024, one vector",
    "sequences": "4 layers of 512 × 512, 64 tokens",
    "scanned": "the same under `scan`",
    "small_gpt": "GPT, 4 blocks of 256, 64 tokens",
}
AGAINST = {  # What grows in a plot, and the values that it has.
    "batch": [16, 32, 64, 128, 256],
    "tokens": [1, 16, 64, 256],
    "layers": [2, 4, 8, 16],
    "width": [128, 256, 512, 1024],
}
DRAWN = ["plain", "one pass", "two passes", "jax-privacy"]
DTYPE = "float32"
SECONDS = 40
"""Of a program, in rounds, at most."""


def cell(target, program, **more):
    return {
        "target": target,
        "chips": 1,
        "case": f"{program}-{DTYPE}-bias",
        "backends": ["triton"],  # Of a GPU.
        "sizes": MODELS[program],
        "contenders": [*CONTENDERS],
        **more,
    }


def cells():
    for target, program in itertools.product(TARGETS, MODELS):
        yield cell(target, program)


def grown_cells():
    for axis, values in AGAINST.items():
        for value in values:
            sizes = MODELS["scanned"] | {axis: value}
            yield cell("cpu", "scanned", sizes=sizes, contenders=DRAWN)


def microbatched(rows):
    """Jax-privacy's rows with the largest microbatch within our memory."""
    for program, sizes in MODELS.items():
        [ours] = chosen(rows, program, target="cpu", contender="one pass")
        size, needed, more = sizes["batch"], math.inf, sizes
        while needed > ours["temporary_bytes"] and size > 1:
            size //= 2
            more = sizes | {"microbatch": size}
            case = Case.named(ours["case"], "jax-privacy")
            function, arguments = clipped.placed(
                case, jax.devices("cpu")[0], clipped.Sizes(**more)
            )
            memory: Any = function.lower(*arguments).compile().memory_analysis()
            needed = memory.temp_size_in_bytes
        yield {"case": ours["case"], "sizes": more, "temporary_bytes": needed}


def timed_cells(microbatches):
    for program in MODELS:
        yield cell("cpu", program, seconds=SECONDS)
    for row in microbatches:
        program = row["case"].split("-")[0]
        two = ["one pass", "jax-privacy"]
        yield cell("cpu", program, sizes=row["sizes"], contenders=two, seconds=SECONDS)


def chosen(rows, program, **fields):
    """The rows of a program that have these fields."""
    fields["case"] = f"{program}-{DTYPE}-bias"
    return [r for r in rows if all(r[name] == value for name, value in fields.items())]


# The tables.


def tables(document):
    """The generated parts of the page, by name."""
    return {"examples": f"{caption(document)}\n\n{of_models(document)}"}


def caption(document):
    versions, timed = document["versions"], document["timed"]
    return (
        f"Compiled {stamped(document)} with JAX {versions['jax']}; timed"
        f" {stamped(timed)} on {place(timed)}, beside jax-privacy 2.0.0:"
    )


def of_models(document):
    heading = ["model", "gradient", *map(memory_of, TARGETS.values())]
    heading += ["CPU: ms", "time / mean gradient", "jax-privacy's time / it"]
    lines = []
    for program, contender in itertools.product(MODELS, CONTENDERS):
        fields = {"contender": contender, "sizes": MODELS[program]}
        rows = chosen(document["rows"], program, **fields)
        rows.sort(key=lambda row: [*TARGETS].index(row["target"]))
        [time] = chosen(document["times"], program, **fields)
        lines.append([NAMES[program], CONTENDERS[contender], *map(memory, rows)])
        lines[-1] += times_of(time)
        if contender == "jax-privacy":
            lines += of_microbatch(document, program)
    return table(heading, lines)


def of_microbatch(document, program):
    for row in chosen(document["microbatches"], program):
        sizes = row["sizes"]
        fields = {"contender": "jax-privacy", "sizes": sizes}
        [time] = chosen(document["times"], program, **fields)
        [ours] = chosen(document["times"], program, contender="one pass", sizes=sizes)
        name = f"jax-privacy, {sizes['microbatch']} at a time"
        slower = f"{1 / ours['to jax-privacy']:.2f} of ours in one pass"
        empty, mebibytes = [""] * (len(TARGETS) - 1), row["temporary_bytes"] / 2**20
        yield [
            NAMES[program],
            name,
            *empty,
            f"{mebibytes:,.0f}",
            f"{1e3 * time['median_s']:,.0f}",
            "",
            slower,
        ]


def times_of(time):
    ratio = time["to jax-privacy"]
    return [
        f"{1e3 * time['median_s']:,.0f}",
        f"{time['to plain']:.2f}",
        f"{1 / ratio:.2f}",
    ]


# The picture.


def draw(document, folder):
    """Write the plot of the temporaries against what grows."""
    lines = {
        axis: {
            CONTENDERS[contender]: [
                (value, row["temporary_bytes"] / 2**20)
                for value in values
                for row in chosen(
                    document["grown"],
                    "scanned",
                    contender=contender,
                    sizes=MODELS["scanned"] | {axis: value},
                )[:1]  # One size is in all of them.
            ]
            for contender in DRAWN
        }
        for axis, values in AGAINST.items()
    }
    drawing.save(folder / "examples-memory.png", plots.against_each, lines)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compiled", action="store_true", help="only compile")
    only.add_argument("--times", action="store_true", help="only the times")
    options = parser.parse_args()
    console, folder = Console(), pathlib.Path("aot_results") / "examples"
    machine = describe(jax.devices("cpu")[0])
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.times:
        rows = rows_of_all(cells(), folder / "compiled", console)
        document |= machine | {"rows": rows}
        document["grown"] = rows_of_all(grown_cells(), folder / "grown", console)
        document["microbatches"] = [*microbatched(rows)]
        results_file.write(document, RESULTS)
    if not options.compiled:
        cells_of_times = timed_cells(document["microbatches"])
        times = rows_of_all(cells_of_times, folder / "timed", console)
        results_file.write(document | {"timed": machine, "times": times}, RESULTS)


if __name__ == "__main__":
    main()
