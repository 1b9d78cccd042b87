"""Write the speed tables of the README, or check them.

    python -m benchmarks.readme [--check]

They stand between two markers and come from the results files of two kinds of CPU, with
bfloat16 instructions (``native.json``) and without (``plain.json``). Results that are
older than the products of the package say so; ``--check`` fails if they should.
"""

import argparse
import difflib
import pathlib

from benchmarks import results_file
from benchmarks.machine import PRODUCT_FILES, ROOT, digest
from benchmarks.model import GPT_STEP
from benchmarks.report import geometric_mean
from benchmarks.rows import rows_of
from jaxlinear.inspect._table import table

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
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
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if it differs"
    )
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    folder = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=pathlib.Path, default=folder)
    options = parser.parse_args()
    try:
        text = options.readme.read_text()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"argument --readme: {options.readme}: {error}")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        parser.error(f"{options.readme}: has not {BEGIN} and {END}, once each")
    try:
        new = with_tables(text, tables(options.results, digest(PRODUCT_FILES)))
    except ValueError as error:
        parser.error(str(error))
    if not options.check:
        options.readme.write_text(new)
    elif new != text:
        names = str(options.readme), "python -m benchmarks.readme"
        lines = difflib.unified_diff(
            text.splitlines(), new.splitlines(), *names, n=0, lineterm=""
        )
        print(*lines, sep="\n")
        raise SystemExit(1)


def with_tables(text, tables):
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"


def tables(folder, products):
    """Markdown of all results in the folder; ValueError if there are none."""
    parts = []
    for having, name in FILES.items():
        path = folder / name
        if path.exists():
            document = results_file.read(path)
            if not document.get("complete", True):
                raise ValueError(f"{path}: of a run that was stopped")
            parts += [caption(document, having, products), layers(document)]
            parts += model(document)
    if not parts:
        raise ValueError(f"{folder}: no results")
    return "\n\n".join(parts)


def caption(document, having, products):
    """Where and when, and whether the products have changed since."""
    model = document.get("cpu", {}).get("model")
    device = f"{model}, {document['device']}" if model else document["device"]
    commit = document.get("commit")
    changed = "" if document.get("tree is clean", True) else " with changes"
    at = f"commit {commit[:7]}{changed}" if commit else "commit not recorded"
    is_same = document.get("products") == products
    age = "" if is_same else "; **older than the package's products**"
    return (
        f"CPU {having} bfloat16 instructions ({device}), JAX"
        f" {document['versions']['jax']}, {document['date'][:10]}, {at}{age}:"
    )


def layers(document):
    """The time of each column over ours, for a whole step of each layer."""
    steps = [row for row in rows_of(document) if row.mode == "step"]
    steps = [r for r in steps if not r.workload.startswith(("growth ", GPT_STEP.name))]
    ratios = {(r.workload, r.library, r.dtype): r.ratio for r in steps}
    lines = []
    for row in {r.workload: r for r in steps}.values():
        shape = f"{row.rows} × {row.in_features} → {row.out_features}"
        found = (ratios.get((row.workload, *c)) for c in COLUMNS.values())
        cells = ("" if ratio is None else f"{ratio:.2f}" for ratio in found)
        lines.append([f"{row.workload} ({shape})", *cells])
    columns = [
        [r.ratio for r in steps if (r.library, r.dtype) == column]
        for column in COLUMNS.values()
    ]
    means = (f"{geometric_mean(column):.2f}" if column else "" for column in columns)
    heading = ["workload (rows × in → out)", *COLUMNS]
    return table(heading, [*lines, ["geometric mean", *means]])


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
            f"{row.peak_bytes / 1e6:.0f}" if row.peak_bytes else "",
            f"{row.temporary_bytes / 1e6:.0f}" if row.temporary_bytes else "",
        ]
        for row in rows
    ]
    return [table(heading, lines)]


if __name__ == "__main__":
    main()
