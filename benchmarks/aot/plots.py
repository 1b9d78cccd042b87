"""PNG plots: memory, bytes on the wire and operations of a device, against devices."""

from matplotlib.figure import Figure

FIGURES = {  # what is plotted: its unit and the size of one
    "peak_bytes": ("memory, GiB", 2**30),
    "wire_bytes": ("sent per step, GiB", 2**30),
    "bytes": ("read and written, GiB", 2**30),
    "flops": ("operations, Tflop", 1e12),
}


def draw(document, folder):
    """A plot for each case that was compiled for several numbers of chips."""
    paths = []
    groups = {}
    for row in document["rows"]:
        key = row["target"], row["case"], row.get("layout"), row.get("axes")
        groups.setdefault(key, []).append(row)
    for (target, case, layout, _), rows in groups.items():
        if len({row["chips"] for row in rows}) > 1:
            figure = against_chips(rows, f"{target}, {case}, {layout}, per device")
            paths.append(folder / f"{target}-{case}-{layout}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def against_chips(rows, title):
    figure = Figure((10, 6.5), layout="constrained")
    figure.suptitle(title)
    for ax, (name, (label, unit)) in zip(
        figure.subplots(2, 2).flat, FIGURES.items(), strict=True
    ):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            mine = sorted(
                (row["chips"], row[name] / unit)
                for row in rows
                if row["contender"] == contender
            )
            style = "--" if contender == "naive" else "-"
            ax.plot(*zip(*mine, strict=True), style, marker="o", label=contender)
        ax.set(xscale="log", xlabel="chips", ylabel=label, ylim=(0, None))
        ticks = sorted({row["chips"] for row in rows})
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
    figure.axes[0].legend(fontsize=8)
    return figure


def against_layers(rows, targets):
    """Temporaries against the number of layers, a panel for each of the targets."""
    figure = Figure((7.5, 4.3), layout="constrained")
    drawn = {  # contender and line: what it is called and how it is drawn
        ("naive", None): ("naive formula", "C1--o"),
        ("ours", None): ("ours", "C1-o"),
        ("naive", "unfenced"): ("naive formula in jax.checkpoint", "C0--o"),
        ("ours", "unfenced"): ("ours in jax.checkpoint", "C0-o"),
    }
    panels = figure.subplots(1, len(targets), sharey=True)
    for ax, (target, name) in zip(panels, targets.items(), strict=True):
        for which, (label, style) in drawn.items():
            mine = sorted(
                (row["sizes"]["layers"], row["temporary_bytes"] / 2**20)
                for row in rows
                if (row["target"], row["contender"], row.get("line"))
                == (target, *which)
            )
            ax.plot(*zip(*mine, strict=True), style, label=label, markersize=4)
        ax.set_title(name)
        ax.set_xticks([2, 8, 16, 32])
        ax.grid(alpha=0.3)
    panels[0].set(ylabel="temporaries, MiB", ylim=(0, None))
    panels[len(panels) // 2].set_xlabel("layers of 2048 × 2048 under scan")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2
    )
    return figure


def against_vocabulary(panels):
    """Temporaries against the classes, {panel: {line: [(classes, bytes)]}}."""
    figure = Figure((7.5, 4.3), layout="constrained")
    styles = ["C1--o", "C0-o", "C2-o"]
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        for style, (label, points) in zip(styles, lines.items(), strict=True):
            x, y = zip(*points, strict=True)
            gibibytes = [size / 2**30 for size in y]
            ax.plot(x, gibibytes, style, label=label, markersize=4)
            ax.set_xticks(x[-3:], [f"{tick:,}" for tick in x[-3:]])
        ax.set(title=name, xlabel="classes", xlim=(0, None))
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="temporaries, GiB", ylim=(0, None))
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=len(styles))
    return figure
