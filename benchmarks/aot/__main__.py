"""Compile for GPUs and TPUs without one, and say what each chip would do.

    python -m benchmarks.aot [--quick] [--target h100] [--chips 8] [--case NAME]

On one chip: the layers of the benchmarks' table, a layer, an MLP and a stack, of ours,
the naive formula and Flax's layer. On several: train steps in each layout, also of ours
with the gradients reduced in the compute dtype. A case is a program, its dtypes, and
`bias` or `plain`, as in `mlp-mixed-bias`. Reported are, per device, what runs (kernels,
floating-point operations, bytes read and written, converts, copies, transposes), what
is sent (bytes by kind and dtype of the collective, and over the wire), memory, and the
seconds to compile. Each case has a process of its own, since a compiler may abort it.
The results go to a JSON file, as they come, and to plots. It needs
`pip install -e '.[aot]'`, best in an environment of its own.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from benchmarks import results_file
from benchmarks.aot import plots, targets
from benchmarks.machine import ROOT, stamp
from benchmarks.progress import Cells

ONE = [f"layer-{dtypes}-bias" for dtypes in ("float32", "bfloat16", "mixed")]
ONE += ["mlp-mixed-bias"]
MANY = ["column-mixed-plain", "row-mixed-bias", "mlp-mixed-plain", "mlp-mixed-bias"]


def cells(options):
    """The cases to compile, on one chip and on several."""
    names = options.target or targets.TARGETS
    for target, chips in itertools.product(names, options.chips):
        if chips == 1:
            for case in options.case or (ONE if options.quick else all_on_one()):
                yield {"target": target, "chips": 1, "case": case}
            continue
        layouts = options.layout or ["data", "fsdp", "tensor", "fsdp_tensor"]
        for layout, axes, case in itertools.product(
            layouts, options.axes, options.case or MANY
        ):
            cell = {"target": target, "chips": chips, "case": case}
            yield cell | {"layout": layout, "axes": axes}


def all_on_one():
    # Imported here: it imports JAX, which a worker sets up first.
    from benchmarks.aot.programs import CASES

    return CASES


def compiled(cell, timeout=1800):
    """The rows of a cell, and why there are not more of them, or None."""
    if why := targets.missing(cell["target"], cell["chips"]):
        return [], why
    command = [sys.executable, "-m", "benchmarks.aot.worker", json.dumps(cell)]
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return [], f"not compiled in {timeout} s"
    rows = [json.loads(line) for line in run.stdout.splitlines() if line[:1] == "{"]
    lines = run.stderr.strip().splitlines() or [""]
    why = f"exit status {run.returncode}: {lines[-1]}" if run.returncode else None
    return [cell | row for row in rows], why


def run(all_cells, output, console):
    """Compile each cell and write the document after each; returns it."""
    if absent := targets.absent(cell["target"] for cell in all_cells):
        sys.exit(absent)
    output.mkdir(parents=True, exist_ok=True)
    document = stamp() | {"rows": [], "failed": []}
    with Cells(console, [1] * len(all_cells)) as progress:
        for cell in all_cells:
            name = name_of(cell)
            progress.begin(name)
            rows, why = compiled(cell)
            document["rows"] += rows
            if why:
                document["failed"].append(cell | {"why": why})
            results_file.write(document, output / "results.json")
            progress.finish(name)
    return document


def name_of(cell):
    return " ".join(str(value) for value in cell.values() if value)


def print_failed(document, console):
    for failed in document["failed"]:
        # Without markup: Rich would take "[aot]" for a style.
        line = f"not compiled: {name_of(failed | {'why': ''})}: {failed['why']}"
        console.print(line, style="red", highlight=False, markup=False)


def rows_of_all(cells, output, console):
    """The rows of cells of which none may fail."""
    document = run(list(cells), output, console)
    print_failed(document, console)
    if document["failed"]:
        raise SystemExit(1)
    return document["rows"]


def table(document):
    columns = "target", "devices", "layout", "case", "", "kernels", "Tflop", "MiB moved"
    columns += "MiB on the wire", "MiB peak", "casts, copies, transposes", "compile s"
    shown = Table(*columns)
    for row in document["rows"]:
        layout = " ".join(filter(None, (row.get("layout"), row.get("axes"))))
        backend = "" if row["backend"] == "tpu" else f" ({row['backend']})"
        moves = (str(row[name]) for name in ("converts", "copies", "transposes"))
        figures = (row[n] / 2**20 for n in ("bytes", "wire_bytes", "peak_bytes"))
        shown.add_row(
            row["target"],
            str(row["devices"]),
            layout,
            row["case"],
            row["contender"] + backend,
            str(row["kernels"]),
            f"{row['flops'] / 1e12:.3f}",
            *(f"{figure:.1f}" for figure in figures),
            ", ".join(moves),
            f"{row['compile_s']:.1f}",
        )
    return shown


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", action="append", choices=targets.TARGETS, help="may be repeated")
    add("--chips", type=int, action="append", help="a power of two; may be repeated")
    add("--case", action="append", metavar="NAME", help="may be repeated")
    add("--layout", action="append", choices=["data", "fsdp", "tensor", "fsdp_tensor"])
    add("--axes", action="append", choices=["auto", "explicit"])
    add("--quick", action="store_true", help="on one chip only a layer and an MLP")
    add("--output", type=pathlib.Path, default=pathlib.Path("aot_results"))
    options = parser.parse_args()
    options.chips = options.chips or [1, 8]
    options.axes = options.axes or ["auto"]
    console = Console()
    # The table needs its width where the terminal does not say its own.
    console.width = max(console.width, 150)
    document = run(list(cells(options)), options.output, console)
    console.print(table(document))
    print_failed(document, console)
    for path in plots.draw(document, options.output):
        console.print(path)
    sys.exit(bool(document["failed"]))


if __name__ == "__main__":
    main()
