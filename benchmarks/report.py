"""The results as tables on the terminal, and two files of them side by side."""

import numpy as np
from rich.table import Table

from benchmarks.results_file import NAIVE, OURS, rows_of
from benchmarks.workloads import DTYPES, MODES, RECIPES


def tables(document):
    """For each dtype and mode our figures, and the ratios of the other libraries."""
    rows = rows_of(document)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        for mode in MODES:
            chosen = [r for r in rows if r.dtype == dtype and r.mode == mode]
            if chosen:
                yield _own_table(f"jaxlinear: {dtype}, {mode}", chosen)
                name = f"{dtype}, {mode}"
                if dtype in RECIPES:
                    name += f"; the others compute in {DTYPES[dtype][0]}"
                yield _ratio_table(f"time / jaxlinear's time: {name}", chosen)
    yield _overhead_table(document["overhead"])


def _own_table(title, rows):
    headings = (
        "ms",
        "±",
        "of limit",
        "GFLOP/s",
        "GB/s",
        "peak MB",
        "temp. MB",
        "kept MB",
        "compile ms",
    )
    table = _table(title, "workload", headings)
    for row in rows:
        if row.library == OURS:
            table.add_row(
                row.workload,
                f"{row.median_s * 1e3:.3g}",
                f"{(row.high_s - row.low_s) / 2 / row.median_s:.0%}",
                f"{row.share_of_limit:.0%}",
                f"{row.flops_per_s / 1e9:.0f}",
                f"{row.bytes_per_s / 1e9:.1f}",
                megabytes(row.peak_bytes, 1),
                megabytes(row.temporary_bytes, 1),
                megabytes(row.kept_bytes, 1),
                f"{row.compile_s * 1e3:.0f}",
            )
    return table


def _ratio_table(title, rows):
    others = [r for r in dict.fromkeys(row.library for row in rows) if r != OURS]
    table = _table(title, "workload", others)
    for workload in dict.fromkeys(row.workload for row in rows):
        cells = {r.library: r.ratio for r in rows if r.workload == workload}
        table.add_row(workload, *(_ratio(cells.get(library)) for library in others))
    table.add_section()
    columns = [[r.ratio for r in rows if r.library == name] for name in others]
    table.add_row("geometric mean", *(_ratio(geometric_mean(c)) for c in columns))
    return table


def _table(title, first, headings):
    table = Table(title=title)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _ratio(ratio):
    if ratio is None:
        return ""
    style = "red" if ratio < 0.97 else "green" if ratio > 1.03 else "default"
    return f"[{style}]{ratio:.2f}[/]"


def megabytes(size, digits):
    """Nothing where nothing was measured."""
    return f"{size / 1e6:.{digits}f}" if size else ""


def geometric_mean(ratios):
    return float(np.exp(np.mean(np.log(ratios))))


def _overhead_table(overhead):
    """What dispatch, tracing and compiling cost, in microseconds."""
    table = _table("overhead", "what", ["jaxlinear, µs", "other, µs", "ratio"])
    pairs = {
        "a call at (1, 4); the jitted naive formula": overhead["dispatch"].values()
    }
    models = overhead["24 layers"].values()
    for step in ("trace", "compile"):
        if models:
            pairs[f"{step} 24 layers; Flax NNX"] = [m[f"{step}_s"] for m in models]
    for what, (ours, other) in pairs.items():
        row = f"{ours * 1e6:.3g}", f"{other * 1e6:.3g}", _ratio(other / ours)
        table.add_row(what, *row)
    return table


def regressions(old, new):
    """Cells where our lead over the naive formula has shrunk, as a table; None if none.

    The ratio is compared, not the time, which depends on the machine and its load. A
    cell counts if the ratio fell by more than 5 % and the middle halves of the rounds
    no longer overlap.
    """
    before = {(row.cell, row.library): row for row in rows_of(old)}
    headings = "dtype", "mode", "ratio before", "ratio now"
    table = _table("regressions", "workload", headings)
    for row in rows_of(new):
        was = before.get((row.cell, row.library))
        if was is None or row.library != NAIVE:
            continue
        if row.ratio < 0.95 * was.ratio and row.ratio_high < was.ratio_low:
            table.add_row(*row.cell, f"{was.ratio:.2f}", f"{row.ratio:.2f}")
    return table if table.row_count else None
