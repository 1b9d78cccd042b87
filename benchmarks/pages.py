"""Write the figures of README and of the documentation from the results, or check them.

With the figures, the plots of speed are drawn; they are not checked.

    python -m benchmarks.pages [--check]

The results are in ``benchmarks/results``: of two kinds of CPU, with bfloat16
instructions (``native.json``) and without (``plain.json``); those of a few rows
(``decoding.json``); the errors against float64
(``accuracy.json``, which ``python -m jaxlinear --json`` writes); and the programs of
the scale study (``scale.json``). How many transformations fail is counted on the page
of them. Results that are older than the products of the package say so; ``--check``
fails if a figure is not that of a result.
"""

import argparse
import collections
import difflib
import json

from benchmarks import plots, results_file
from benchmarks.aot import study
from benchmarks.machine import PRODUCT_FILES, ROOT, digest
from benchmarks.marked import written
from benchmarks.model import GPT_STEP
from benchmarks.report import geometric_mean, megabytes
from benchmarks.rows import OURS, rows_of
from jaxlinear.inspect._table import table

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
TRANSFORMATIONS = ROOT / "docs" / "transformations.md"
FILES = {"with": "native.json", "without": "plain.json"}
"""Whether the CPU has bfloat16 instructions."""

COLUMNS = {
    "naive, float32": ("naive formula", "float32"),
    "naive, bfloat16": ("naive formula", "bfloat16"),
    "naive, mixed": ("naive formula", "mixed"),
    "Flax NNX, bfloat16": ("Flax NNX", "bfloat16"),
    "Flax NNX, mixed": ("Flax NNX", "mixed"),
    "PyTorch, float32": ("PyTorch", "float32"),
    "PyTorch, bfloat16": ("PyTorch", "bfloat16"),
}


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.pages", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a page differs"
    )
    is_check = parser.parse_args().check
    changes = list(changed_pages(PAGES, parts()))
    for path, old, new in changes:
        if not is_check:
            path.write_text(new)
            continue
        lines = old.splitlines(), new.splitlines()
        names = str(path), "python -m benchmarks.pages"
        print(*difflib.unified_diff(*lines, *names, n=0, lineterm=""), sep="\n")
    if changes and is_check:
        raise SystemExit(1)
    if not is_check:
        document = results_file.read(RESULTS / FILES["with"])
        plots.draw(document, ROOT / "docs", prefix="speed-")


def changed_pages(pages, parts):
    """The path of each page that differs, its text, and what it should be."""
    for path in pages:
        old = path.read_text()
        new = written(old, parts)
        if new != old:
            yield path, old, new


def parts():
    """The generated parts, by name."""
    timed = {h: results_file.read(RESULTS / name) for h, name in FILES.items()}
    for having, document in timed.items():
        if not document.get("complete", True):
            raise ValueError(f"{FILES[having]}: of a run that was stopped")
    measured, scale = (
        json.loads((RESULTS / name).read_text())
        for name in ("accuracy.json", "scale.json")
    )
    return {
        "headline": headline(measured, timed["with"]),
        "means": means(timed),
        "transformations": transformations(TRANSFORMATIONS.read_text()),
        "accuracy": errors(measured),
        "speed": speed(timed, digest(PRODUCT_FILES)),
        "decoding": decoding(results_file.read(RESULTS / "decoding.json")),
        **study.tables(scale),
    }


# What README says.


def headline(measured, timed):
    """What the layer gains in mixed precision, in a sentence."""
    error = {
        m["layer"]: m["error"]
        for m in with_default_precision(measured)
        if (m["dtype"], m["quantity"]) == ("mixed", "∇W")
    }
    found = ratios(timed)[COLUMNS["Flax NNX, mixed"]]
    return (
        "In mixed precision the relative error of a weight gradient is"
        f" {error['jaxlinear']:.1e} where Flax's layer has {error['Flax']:.1e}, and a"
        f" training step is {geometric_mean([*found.values()]):.1f} times as fast"
        f" ({timed['cpu']['model']} with"
        " bfloat16 instructions, geometric mean of"
        f" {len(found)} layers)."
    )


def means(timed):
    """The geometric means of the tables of speed, a line for each machine."""
    chosen = "naive, float32", "naive, mixed", "Flax NNX, mixed", "PyTorch, bfloat16"
    lines = []
    for having, document in timed.items():
        found = ratios(document)
        columns = (mean(found[COLUMNS[name]]) for name in chosen)
        lines.append([machine(document, having), *columns])
    return table(["time of the other / ours", *chosen], lines)


def transformations(page):
    """In how many rows of the table of transformations each way to write it fails."""
    header, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| ")
    ]
    rows = [row for row in rows if row[0] and row[0] != "---"]
    names = "`x @ w.T + b`", "plain `custom_vjp`", "`linear`"
    failed = [sum("✗" in row[header.index(name)] for row in rows) for name in names]
    return table(
        ["", *names], [[f"{len(rows)} transformations: fails or costs more", *failed]]
    )


# The tables of the documentation.


def errors(measured):
    """The error of each quantity and layer, with the default precision."""
    cells = {
        (f"{m['dtype']} {m['quantity']}", m["layer"]): m
        for m in with_default_precision(measured)
    }
    rows, layers = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))

    def cell(row, layer):
        found = cells.get((row, layer))
        if found is None:  # Of 8 bits there is our layer alone.
            return ""
        return f"{found['error']:.1e}{'' if found['is_explained'] else ' (!)'}"

    lines = [[row, *(cell(row, layer) for layer in layers)] for row in rows]
    return (
        f"Relative errors on a {measured['device']}, JAX {measured['jax']},"
        f" {measured['rows']} rows of {measured['features']} features; (!): more than"
        f" rounding explains.\n\n{table(['', *layers], lines)}"
    )


def with_default_precision(measured):
    return [m for m in measured["measurements"] if m["precision"] == "default"]


def speed(timed, products):
    """All timings of whole steps, for each machine."""
    tables = []
    for having, document in timed.items():
        tables += [caption(document, having, products), layers(document)]
        tables += model(document)
    return "\n\n".join(tables)


def machine(document, having):
    model = document.get("cpu", {}).get("model")
    return f"CPU {having} bfloat16 instructions ({model or document['device']})"


def caption(document, having, products):
    """Where and when, and whether the products have changed since."""
    commit = document.get("commit")
    changed = "" if document.get("tree is clean", True) else " with changes"
    at = f"commit {commit[:7]}{changed}" if commit else "commit not recorded"
    is_same = document.get("products") == products
    age = "" if is_same else "; **older than the package's products**"
    cores = document["device"].removeprefix("CPU, ")
    return (
        f"{machine(document, having)}, {cores}, JAX"
        f" {document['versions']['jax']}, {document['date'][:10]}, {at}{age}:"
    )


def steps(document):
    """The rows of whole steps of one layer."""
    rows = [row for row in rows_of(document) if row.mode == "step"]
    return [r for r in rows if not r.workload.startswith(("growth ", GPT_STEP.name))]


def ratios(document):
    """The time of each library and dtype over ours, by workload."""
    found = collections.defaultdict(dict)
    for row in steps(document):
        found[row.library, row.dtype][row.workload] = row.ratio
    return found


def mean(ratios):
    return f"{geometric_mean([*ratios.values()]):.2f}" if ratios else ""


def layers(document):
    """The time of each column over ours, for a whole step of each layer."""
    found = ratios(document)
    columns = [found[column] for column in COLUMNS.values()]
    lines = []
    for row in {row.workload: row for row in steps(document)}.values():
        shape = f"{row.rows} × {row.in_features} → {row.out_features}"
        cells = (
            f"{column[row.workload]:.2f}" if row.workload in column else ""
            for column in columns
        )
        lines.append([f"{row.workload} ({shape})", *cells])
    heading = ["workload (rows × in → out)", *COLUMNS]
    return table(heading, [*lines, ["geometric mean", *map(mean, columns)]])


def decoding(document):
    """The forward pass of a few rows: our time, and that of each other over it."""
    columns = COLUMNS.values()
    columns = [column for column in columns if column[1] in ("float32", "bfloat16")]
    found = collections.defaultdict(dict)
    for row in rows_of(document):
        if row.workload.startswith("decoding "):
            found[row.rows, row.in_features, row.out_features][
                row.library, row.dtype
            ] = row
    lines = []
    for (rows, inputs, outputs), cells in found.items():
        line = [f"{rows} × {inputs} → {outputs}"]
        for dtype in ("float32", "bfloat16"):
            ours = cells[OURS, dtype]
            megabyte = ours.temporary_bytes / 2**20
            line += [f"{ours.median_s * 1e3:.2f} ms", f"{megabyte:.1f} MiB"]
            line += [
                f"{cells[column].ratio:.2f}" if column in cells else ""
                for column in columns
                if column[1] == dtype
            ]
        lines.append(line)
    heading = ["rows × in → out"]
    for dtype in ("float32", "bfloat16"):
        heading += [f"ours, {dtype}", "temporaries"]
        heading += [name for name, column in COLUMNS.items() if column[1] == dtype]
    is_native = document["cpu"]["bfloat16 instructions"] == "yes"
    where = caption(document, "with" if is_native else "without", digest(PRODUCT_FILES))
    return f"{where}\n\n{table(heading, lines)}"


def model(document):
    """The training step of a whole model, if it was measured."""
    rows = [row for row in rows_of(document) if row.workload == GPT_STEP.name]
    if not rows:
        return []
    heading = GPT_STEP.name, "ms", "/ ours", "compile s", "peak MB", "temporaries MB"
    lines = [
        [
            f"{row.library}, {row.dtype}",
            f"{row.median_s * 1e3:.0f}",
            f"{row.ratio:.2f}",
            f"{row.compile_s:.1f}",
            megabytes(row.peak_bytes, 0),
            megabytes(row.temporary_bytes, 0),
        ]
        for row in rows
    ]
    return [table(heading, lines)]


if __name__ == "__main__":
    main()
