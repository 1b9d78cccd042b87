"""Write the tables of README and of the documentation from the results, or check them.

With the tables, the plots are drawn; they are not checked.

    python -m benchmarks.pages [--check]

The results are in ``benchmarks/results``: timings on a CPU with bfloat16 instructions
(``native.json``), on one without (``plain.json``) and of few rows (``decoding.json``);
the errors against float64 (``accuracy.json``, from ``python -m jaxlinear --json``); the
programs of the scale study (``scale.json``), of what the backward pass keeps
(``kept.json``), of the loss of a last layer (``loss.json``) and of the gradients of
single examples (``examples.json``); and what comes of trainings (``outcomes.json``).
The findings are read from the headers of their scripts.
The failing transformations are counted on their own page. ``older`` in a file of
results is written by hand: it names the products that have changed since the file was
measured, and is shown with the figures.
"""

import argparse
import collections
import difflib
import json

import numpy as np

from benchmarks import examples, findings_page, loss, outcomes_page, plots, results_file
from benchmarks.aot import kept, study
from benchmarks.machine import ROOT, kind, place, stamped
from benchmarks.model import GPT_STEP
from benchmarks.report import geometric_mean, megabytes
from benchmarks.results_file import AGAIN, NAIVE, OURS, doubts, rows_of
from jaxlinear.inspect._table import table

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
TRANSFORMATIONS = DOCS / "transformations.md"
TIMED = "native.json", "plain.json"

COLUMNS = {
    "naive, float32": (NAIVE, "float32"),
    "naive, bfloat16": (NAIVE, "bfloat16"),
    "naive, mixed": (NAIVE, "mixed"),
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
        plots.draw(results_file.read(RESULTS / TIMED[0]), DOCS, prefix="speed-")
        study.draw(compiled("scale.json"), DOCS)
        kept.draw(compiled("kept.json"), DOCS)
        loss.draw(compiled("loss.json"), DOCS)
        examples.draw(compiled("examples.json"), DOCS)
        outcomes_page.draw(compiled("outcomes.json"), DOCS)


def changed_pages(pages, parts):
    """The path of each page that differs, its text, and what it should be."""
    for path in pages:
        old = path.read_text()
        new = written(old, parts)
        if new != old:
            yield path, old, new


def written(page, parts):
    """The page with each of the ``parts``, by name, between its marks where it has any.

    The marks are ``<!-- name: begin -->`` and ``<!-- name: end -->``.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if page.count(begin) > 1 or page.count(begin) != page.count(end):
            raise ValueError(f"a page has not {begin} and {end}, once each")
        if begin in page:
            before, _, rest = page.partition(begin)
            page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


def parts():
    """The generated parts, by name."""
    timed = [results_file.read(RESULTS / name) for name in TIMED]
    for name, document in zip(TIMED, timed, strict=True):
        if not document["complete"]:
            raise ValueError(f"{name}: of a run that was stopped")
    return {
        "means": means(timed),
        "transformations": transformations(TRANSFORMATIONS.read_text()),
        "accuracy": errors(json.loads((RESULTS / "accuracy.json").read_text())),
        "speed": speed(timed),
        "decoding": decoding(results_file.read(RESULTS / "decoding.json")),
        **study.tables(compiled("scale.json")),
        **kept.tables(compiled("kept.json")),
        **loss.tables(compiled("loss.json")),
        **examples.tables(compiled("examples.json")),
        **outcomes_page.tables(compiled("outcomes.json")),
        **findings_page.tables(),
    }


def compiled(name):
    return json.loads((RESULTS / name).read_text())


# What README says.


def means(timed):
    """The geometric means of the tables of speed, a line for each machine."""
    chosen = "naive, float32", "naive, mixed", "Flax NNX, mixed", "PyTorch, float32"
    lines = []
    for document in timed:
        found = ratios(document)
        columns = (mean(found[COLUMNS[name]]) for name in chosen)
        lines.append([kind(document) + age(document), *columns])
    return table(["time/ours", *chosen], lines)


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
        for m in measured["measurements"]
        if m["precision"] == "default"
    }
    rows, layers = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))

    def cell(row, layer):
        found = cells.get((row, layer))
        if found is None:  # Only our layer has 8 bits.
            return ""
        return f"{found['error']:.1e}{'' if found['is_explained'] else ' (!)'}"

    lines = [[row, *(cell(row, layer) for layer in layers)] for row in rows]
    return (
        f"Relative errors on a {measured['device']}, JAX {measured['jax']}, measured on"
        f" {measured['date'][:10]}, {measured['rows']} rows of {measured['features']}"
        f" features, {measured['classes']:,} classes of the loss; (!): more than"
        f" rounding explains.\n\n{table(['', *layers], lines)}"
    )


def speed(timed):
    """All timings of whole steps, for each machine."""
    tables = []
    for document in timed:
        tables += [caption(document), layers(document), *model(document)]
    return "\n\n".join(tables)


def age(document):
    """What is newer than the figures, as their file says."""
    return f", **older than {document['older']}**" if "older" in document else ""


def caption(document):
    """Where and when it was measured, and what says how well."""
    rows = rows_of(document)
    said = [
        f"{place(document)}, JAX {document['versions']['jax']}, measured"
        f" {stamped(document)}{age(document)}"
    ]
    if peer := document.get("PyTorch"):
        said.append(
            f"PyTorch {document['versions']['torch']} has {peer['threads']} threads;"
            f" its libraries choose {peer['float32']} in float32 and"
            f" {peer['bfloat16'] or 'no instructions'} in bfloat16"
        )
    if beside := [row.ratio for row in rows if row.library == AGAIN]:
        range_ = f"{min(beside):.2f} to {max(beside):.2f}"
        said.append(f"The naive formula beside itself: {range_}")
    if loads := [r.others_cores for r in rows if r.others_cores is not None]:
        said.append(f"Other processes used {np.median(loads):.2f} cores")
    if found := doubts(rows):
        said.append(f"**Doubts about this run: {'; '.join(found)}**")
    return f"{'. '.join(said)}:"


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
    """The forward pass of a few rows: our time, and the others' over it."""
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
    return f"{caption(document)}\n\n{table(heading, lines)}"


def model(document):
    """The training step of a whole model, if it was measured."""
    rows = [row for row in rows_of(document) if row.workload == GPT_STEP.name]
    rows = [row for row in rows if row.library != AGAIN]
    if not rows:
        return []
    heading = [GPT_STEP.name, "ms", "/ ours", "compile s", "peak MB", "temporaries MB"]
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
    if all(row.loss is not None for row in rows):  # Older results do not have it.
        heading.append("loss")
        for line, row in zip(lines, rows, strict=True):
            line.append(f"{row.loss:.5f}")
    return [table(heading, lines)]


if __name__ == "__main__":
    main()
