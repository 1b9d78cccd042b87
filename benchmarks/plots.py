"""PNG plots of the results: ratio per workload, roofline, cost against rows."""

import numpy as np

from benchmarks import drawing
from benchmarks.results_file import AGAIN, NAIVE, OURS, rows_of


def draw(document, folder, prefix=""):
    """Write the plots for which there are results; returns their paths."""
    steps = [row for row in rows_of(document) if row.mode == "step"]
    growth = [row for row in steps if row.workload.startswith("growth ")]
    table = [row for row in steps if row not in growth]
    plots = {
        "ratio": (ratio, table),
        "roofline": (roofline, table),
        "growth": (cost, growth),
    }
    paths = []
    for name, (plot, rows) in plots.items():
        if rows:
            paths.append(folder / f"{prefix}{name}.png")
            drawing.save(paths[-1], captioned, plot, rows, document)
    return paths


def captioned(plot, rows, document):
    figure = plot(rows, document)
    figure.supxlabel(caption(document), fontsize=8, x=0.01, ha="left")
    return figure


def caption(document):
    jax_version = document["versions"]["jax"]
    return f"{document['device']} · JAX {jax_version} · {document['date'][:10]}"


def ratio(rows, document):
    """Time of each library over ours, a panel for each dtype; above one we lead."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    libraries = dict.fromkeys(row.library for row in rows)
    libraries = [name for name in libraries if name not in (OURS, AGAIN)]
    panel = 0.4 * len(workloads) + 0.4
    figure, axes = drawing.stacked(len(dtypes), panel, sharex=True)
    height = 0.85 / len(libraries)
    for ax, dtype in zip(axes, dtypes, strict=True):
        for i, library in enumerate(libraries):
            found = {
                row.workload: row
                for row in rows
                if row.dtype == dtype and row.library == library
            }
            places = [k for k, w in enumerate(workloads) if w in found]
            # From one on: what is slower than ours to the right, what is faster left.
            lengths = [found[workloads[k]].ratio - 1 for k in places]
            ax.barh(
                [k + (i + 0.5) * height - 0.425 for k in places],
                lengths,
                height,
                left=1,
                label=library,
            )
        ax.axvline(1, color=drawing.GREY, linewidth=0.8)
        ax.set(xscale="log", title=f"{dtype}: time / time of jaxlinear")
        ax.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        ax.minorticks_off()
        ax.tick_params(labelbottom=True)
        ax.set_yticks(range(len(workloads)), workloads, fontsize=9)
        ax.invert_yaxis()
        ax.margins(y=0.01)
    drawing.legend(figure, axes[0])
    return figure


def roofline(rows, document):
    """Achieved FLOP/s of our step against its FLOPs per byte, under the ceilings."""
    figure, [ax] = drawing.stacked(1, 3.5)
    copy = document["ceilings"]["copy"]["bytes_per_s"][-1]
    ours = [row for row in rows if row.library == OURS]
    for k, dtype in enumerate(dict.fromkeys(row.dtype for row in ours)):
        chosen = [row for row in ours if row.dtype == dtype]
        intensity = np.array([row.flops_per_s / row.bytes_per_s for row in chosen])
        peak = document["ceilings"][chosen[0].compute_dtype]["flops_per_s"]
        line = np.geomspace(min(0.3, intensity.min()), max(3e3, intensity.max()))
        ax.plot(line, np.minimum(peak, line * copy) / 1e9, f"C{k}", linewidth=0.8)
        ax.plot(
            intensity,
            [row.flops_per_s / 1e9 for row in chosen],
            f"C{k}o",
            label=dtype,
        )
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    ax.set_title("A step under the fastest product and copy", fontsize=10)
    ax.legend()
    return figure


def cost(rows, document):
    """Time and memory of a step per row against the number of rows."""
    figure, (time_ax, memory_ax) = drawing.stacked(2, 3, sharex=True)
    for k, dtype in enumerate(dict.fromkeys(row.dtype for row in rows)):
        for library, style in {OURS: "o-", NAIVE: "o:"}.items():
            chosen = [r for r in rows if r.dtype == dtype and r.library == library]
            x = np.array([row.rows for row in chosen])
            label = f"{dtype}, {library}"
            time_ax.plot(
                x,
                [1e6 * r.median_s / r.rows for r in chosen],
                f"C{k}{style}",
                label=label,
                markersize=3,
            )
            memory_ax.plot(
                x,
                [r.peak_bytes / r.least_bytes for r in chosen],
                f"C{k}{style}",
                label=label,
                markersize=3,
            )
    time_ax.set(xscale="log", yscale="log", ylabel="µs per row, whole step")
    memory_ax.set(xlabel="rows", ylabel="peak bytes / bytes\nof arguments and results")
    memory_ax.set_ylim(bottom=1)
    drawing.legend(figure, time_ax)
    return figure
