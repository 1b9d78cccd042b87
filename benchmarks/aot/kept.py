"""What the backward pass keeps of float32 weights under bfloat16 compute.

    python -m benchmarks.aot.kept [--times]

The naive formula, Flax's layer and ours, each without `jax.checkpoint` around the
layer, with it, and with its `prevent_cse=False`: eight layers of 2048 x 2048 under
`scan` and written out, also on eight devices, and a step of a GPT of scanned blocks.
They are compiled for an H100, a TPU v5e and this CPU, and timed on this CPU in five
minutes; `--times` measures only the times again. It writes
`benchmarks/results/kept.json`, and `python -m benchmarks.pages` writes the rest.
"""

import argparse
import itertools
import json
import pathlib

import jax
from rich.console import Console

from benchmarks import drawing, results_file
from benchmarks.aot import plots
from benchmarks.aot.__main__ import rows_of_all
from benchmarks.machine import ROOT, describe, place, stamped
from jaxlinear.inspect._table import table

RESULTS = ROOT / "benchmarks" / "results" / "kept.json"
TARGETS = {"h100": "H100", "v5e": "TPU v5e", "cpu": "CPU"}
CONTENDERS = {"naive": "naive formula", "Flax": "Flax's layer", "ours": "ours"}
EIGHT_BITS = ["FLOAT8", "INT8"]
LINES = {None: "no", "fenced": "fenced", "unfenced": "unfenced"}
LINES_OF_EIGHT_BITS = {
    None: "no",
    "unfenced": "unfenced",
    "with the policy": "unfenced, with the policy",
}
LAYERS = {"layers": 8, "width": 2048, "rows": 512}
GPT = LAYERS | {"width": 1024}
PROGRAMS = {"scanned": LAYERS, "written": LAYERS, "gpt": GPT, "remat": GPT}
DEPTHS = [2, 4, 8, 16, 32]
LAYOUTS = {"fsdp": "fully sharded", "tensor": "column-parallel"}
SECONDS = 8
"""Of a program, in rounds, at most."""


def cell(target, program, **more):
    return {
        "target": target,
        "chips": 1,
        "case": f"{program}-mixed-plain",
        "backends": ["triton"],  # Of a GPU.
        "sizes": PROGRAMS[program],
        "contenders": [*CONTENDERS],
        "lines": [*LINES],
        **more,
    }


def cells():
    for target, program in itertools.product(TARGETS, PROGRAMS):
        yield cell(target, program)
    for target in TARGETS:
        lines = [*LINES_OF_EIGHT_BITS]
        yield cell(target, "scanned", contenders=EIGHT_BITS, lines=lines)
    two, without = ["naive", "ours"], [None, "unfenced"]
    for target, depth in itertools.product(TARGETS, DEPTHS):
        if depth != LAYERS["layers"]:
            sizes = LAYERS | {"layers": depth}
            yield cell(target, "scanned", sizes=sizes, contenders=two, lines=without)
    for target, layout in itertools.product(("h100", "v5e"), LAYOUTS):
        several = {"chips": 8, "layout": layout, "sizes": LAYERS | {"rows": 4096}}
        for program in ("scanned", "written"):
            yield cell(target, program, contenders=two, **several)


def timed_cells():
    return [cell("cpu", program, seconds=SECONDS) for program in PROGRAMS]


def chosen(rows, program, **fields):
    """The rows of a program with these fields, or without those that are None."""
    fields["case"] = f"{program}-mixed-plain"
    return [r for r in rows if all(r.get(k) == value for k, value in fields.items())]


# The tables.


def tables(document):
    """The generated parts of the page, by name."""
    heading = ["layer", "`jax.checkpoint`", *map(memory_of, TARGETS.values())]
    heading += ["products, Gflop", "converts", "CPU: time / naive", "time / ours"]
    lines = {program: [*lines_of(document, program)] for program in PROGRAMS}
    blocks = {"gpt": "no", "remat": "yes"}
    gpt = [[blocks[name], *line] for name in blocks for line in lines[name]]
    return {
        "kept": f"{caption(document)}\n\n{table(heading, lines['scanned'])}",
        "kept-written": table(heading, lines["written"]),
        "kept-gpt": table(["block recomputed", *heading], gpt),
        "kept-eight-bits": eight_bits(document["rows"]),
        "kept-sharded": sharded(document["rows"]),
    }


def caption(document):
    return (
        f"Compiled {stamped(document)} with JAX {document['versions']['jax']}."
        f" {place(document)}, timed {stamped(document['timed'])}:"
    )


def memory_of(name):
    return f"{name}: temporaries / moved, MiB"


def memory(row):
    sizes = row["temporary_bytes"], row["bytes"]
    return " / ".join(f"{size / 2**20:,.0f}" for size in sizes)


def lines_of(document, program):
    """A line for each layer, without and with the line around it."""
    sizes = PROGRAMS[program]
    for contender, line in itertools.product(CONTENDERS, LINES):
        fields = {"contender": contender, "line": line, "sizes": sizes, "layout": None}
        rows = chosen(document["rows"], program, **fields)
        rows.sort(key=lambda row: [*TARGETS].index(row["target"]))
        [time] = chosen(document["times"], program, **fields)
        flops = dict.fromkeys(f"{row['flops'] / 1e9:,.0f}" for row in rows)
        yield [
            *(CONTENDERS[contender], LINES[line]),
            *map(memory, rows),
            " / ".join(flops),
            " / ".join(str(row["converts"]) for row in rows),
            *(f"{time[name]:.2f}" for name in ("to naive", "to ours")),
        ]


def eight_bits(rows):
    heading = ["products", "`jax.checkpoint`", *map(memory_of, TARGETS.values())]
    lines = []
    for recipe, line in itertools.product(EIGHT_BITS, LINES_OF_EIGHT_BITS):
        found = chosen(rows, "scanned", contender=recipe, line=line)
        names = f"`{recipe}`", LINES_OF_EIGHT_BITS[line]
        lines.append([*names, *map(memory, found)])
    return table(heading, lines)


def sharded(rows):
    """Eight devices: what is also gathered and sent."""
    heading, lines = ["layers", "weights", "layer", "`jax.checkpoint`"], []
    for target in ("h100", "v5e"):
        name = TARGETS[target]
        heading += [memory_of(name), f"{name}: gathered / sent, MiB"]
    keys = itertools.product(("scanned", "written"), LAYOUTS, CONTENDERS, LINES)
    for program, layout, contender, line in keys:
        fields = {"layout": layout, "contender": contender, "line": line}
        if found := chosen(rows, program, **fields):
            names = LAYOUTS[layout], CONTENDERS[contender], LINES[line]
            lines.append([program, *names])
            for row in found:
                lines[-1] += [memory(row), collectives(row)]
    return table(heading, lines)


def collectives(row):
    gathered = sum(s for kind, _, s in row["collectives"] if kind == "all-gather")
    return " / ".join(f"{size / 2**20:,.0f}" for size in (gathered, row["wire_bytes"]))


# The picture.


def draw(document, folder):
    """Write the plot of the temporaries against the number of layers."""
    rows = chosen(document["rows"], "scanned", layout=None)
    drawing.save(folder / "kept-depth.png", plots.against_layers, rows, TARGETS)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.kept",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", action="store_true", help="only the times")
    is_timed_only = parser.parse_args().times
    console, folder = Console(), pathlib.Path("aot_results") / "kept"
    machine = describe(jax.devices("cpu")[0])

    def finished(cells, name):
        return rows_of_all(cells, folder / name, console)

    if is_timed_only:
        document = json.loads(RESULTS.read_text())
    else:
        document = machine | {"rows": finished(cells(), "compiled")}
    document |= {"timed": machine, "times": finished(timed_cells(), "timed")}
    results_file.write(document, RESULTS)


if __name__ == "__main__":
    main()
