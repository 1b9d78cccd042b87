"""A model of 174 billion parameters on 64 to 8,192 chips, compiled without one.

    python -m benchmarks.aot.study

The linear layers of GPT-3 (12,288 wide, 49,152 hidden, 96 blocks, scanned and
recomputed), FSDP times tensor parallelism, 2,048 tokens a chip, in mixed precision, for
v5p and the H100: ours, ours with gradients reduced in bfloat16, the naive formula;
with fewer rows in a shard; and with q, k and v in one layer and in three. It writes
`benchmarks/results/scale.json`; `python -m benchmarks.pages` writes the rest.
"""

import itertools
import pathlib
from operator import itemgetter

from rich.console import Console

from benchmarks import drawing, results_file
from benchmarks.aot import plots
from benchmarks.aot.__main__ import print_failed, run
from benchmarks.machine import ROOT, stamped
from jaxlinear.inspect._table import table

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
GPT3 = {"width": 12288, "hidden": 49152, "layers": 96}
TENSOR = {"v5p": 4, "h100": 8}
CHIPS = {"v5p": [64, 256, 1024, 4096, 8192], "h100": [64, 256, 1024]}
TOKENS = 2048
CONTENDERS = ["ours", "ours, reduced", "naive"]
FIGURES = {  # heading: the field, its unit, digits
    "peak, GiB": ("peak_bytes", 2**30, 1),
    "Tflop": ("flops", 1e12, 1),
    "read and written, GiB": ("bytes", 2**30, 0),
    "on the wire, GiB": ("wire_bytes", 2**30, 0),
}


def cell(target, chips, case, contenders=CONTENDERS, tokens=TOKENS):
    sizes = GPT3 | {"tensor": TENSOR[target], "rows": tokens * TENSOR[target]}
    return {
        "target": target,
        "chips": chips,
        "case": case,
        "layout": "fsdp_tensor",
        "axes": "auto",
        "sizes": sizes,
        "contenders": contenders,
    }


def cells():
    for target in TENSOR:
        for chips in CHIPS[target]:
            yield cell(target, chips, "gpt-mixed-plain")
    for target in TENSOR:
        yield cell(target, 256, "gpt_three-mixed-plain", ["ours, reduced"])
    # Few rows for each shard of the data.
    for tokens in (512, 128, 32):
        yield cell("v5p", 1024, "gpt-mixed-plain", tokens=tokens)


def tokens(row):
    return row["sizes"]["rows"] // row["sizes"]["tensor"]


def layers_of_qkv(row):
    return "in one layer" if row["case"].startswith("gpt-") else "in three layers"


def full_rows(document, target):
    """The rows of a target with all the tokens a chip, on any number of chips."""
    return [
        row
        for row in document["rows"]
        if row["target"] == target
        and row["case"].startswith("gpt-")
        and tokens(row) == TOKENS
    ]


def tables(document):
    """The generated parts of the page, by name."""
    rows = document["rows"]
    few = [r for r in rows if (r["target"], r["chips"]) == ("v5p", 1024)]
    reduced = [r for r in rows if r["contender"] == "ours, reduced"]
    qkv = [r for r in reduced if r["chips"] == 256]
    qkv.sort(key=lambda row: (row["target"], row["case"]))
    chips, target = itemgetter("chips"), itemgetter("target")
    full = {t: markdown(full_rows(document, t), {"chips": chips}) for t in TENSOR}
    return {
        **{t: f"Compiled {stamped(document)}:\n\n{full[t]}" for t in TENSOR},
        "rows": markdown(few, {"tokens a chip": tokens}),
        "qkv": markdown(qkv, {"target": target, "q, k and v": layers_of_qkv}),
    }


def markdown(rows, columns):
    """A table with these columns, and the figures of each row's contenders."""
    lines = []
    groups = itertools.groupby(
        rows, lambda row: [str(f(row)) for f in columns.values()]
    )
    for first, group in groups:
        found = {row["contender"]: row for row in group}
        found = [found[name] for name in CONTENDERS if name in found]
        lines.append([*first, *(figures(found, *of) for of in FIGURES.values())])
    return table([*columns, *FIGURES], lines)


def figures(rows, name, unit, digits):
    return " / ".join(f"{row[name] / unit:,.{digits}f}" for row in rows)


def draw(document, folder):
    """Write the plots against the number of chips."""
    for target in TENSOR:
        rows = full_rows(document, target)
        title = f"174 billion parameters on {target}"
        drawing.save(folder / f"scale-{target}.png", plots.against_chips, rows, title)


def main():
    console = Console()
    folder = pathlib.Path("aot_results") / "study"
    document = run(list(cells()), folder, console)
    print_failed(document, console)
    if document["failed"]:
        raise SystemExit(1)
    results_file.write(document, RESULTS)


if __name__ == "__main__":
    main()
