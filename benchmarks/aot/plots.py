"""PNG plots: memory, bytes on the wire and operations of a device, against devices."""

from benchmarks import drawing

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
            title = f"{target}, {case}, {layout}, per device"
            paths.append(folder / f"{target}-{case}-{layout}.png")
            drawing.save(paths[-1], against_chips, rows, title)
    return paths


def against_chips(rows, title):
    figure, axes = drawing.stacked(len(FIGURES), 2, sharex=True)
    for ax, (name, (label, unit)) in zip(axes, FIGURES.items(), strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            mine = sorted(
                (row["chips"], row[name] / unit)
                for row in rows
                if row["contender"] == contender
            )
            style = "--" if contender == "naive" else "-"
            ax.semilogx(*zip(*mine, strict=True), style, marker="o", label=contender)
        top = max(row[name] for row in rows) / unit
        ax.set(ylabel=label, ylim=(0, 1.1 * top))
        ticks = sorted({row["chips"] for row in rows})
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
    axes[0].set_title(title, fontsize=10)
    axes[-1].set_xlabel("chips")
    drawing.legend(figure, axes[0])
    return figure


def against_layers(rows, targets):
    """Temporaries against the number of layers, a panel for each of the targets."""
    figure, axes = drawing.stacked(len(targets), 2, sharex=True)
    drawn = {  # contender and line: what it is called and how it is drawn
        ("naive", None): ("naive formula", "C1--o"),
        ("ours", None): ("ours", "C1-o"),
        ("naive", "unfenced"): ("naive formula in jax.checkpoint", "C0--o"),
        ("ours", "unfenced"): ("ours in jax.checkpoint", "C0-o"),
    }
    for ax, (target, name) in zip(axes, targets.items(), strict=True):
        for which, (label, style) in drawn.items():
            mine = sorted(
                (row["sizes"]["layers"], row["temporary_bytes"] / 2**20)
                for row in rows
                if (row["target"], row["contender"], row.get("line"))
                == (target, *which)
            )
            ax.plot(*zip(*mine, strict=True), style, label=label, markersize=4)
        ax.set(title=name, ylabel="temporaries, MiB", ylim=(0, None))
        ax.set_xticks([2, 8, 16, 32])
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("layers of 2048 × 2048 under scan")
    drawing.legend(figure, axes[0], columns=1)
    return figure


def against_vocabulary(panels):
    """Temporaries against the classes, {panel: {line: [(classes, bytes)]}}."""
    figure, axes = drawing.stacked(len(panels), 2.5, sharex=True)
    styles = ["C1--o", "C0-o", "C2-o"]
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        for style, (label, points) in zip(styles, lines.items(), strict=True):
            x, y = zip(*points, strict=True)
            gibibytes = [size / 2**30 for size in y]
            ax.plot(x, gibibytes, style, label=label, markersize=4)
            ax.set_xticks(x[-3:], [f"{tick:,}" for tick in x[-3:]])
        ax.set(title=name, ylabel="temporaries, GiB", xlim=(0, None), ylim=(0, None))
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("classes")
    drawing.legend(figure, axes[0])
    return figure


def against_each(panels):
    """Temporaries in MiB against what grows, {panel: {line: [(size, MiB)]}}."""
    figure, axes = drawing.stacked(len(panels), 2.5)
    styles = ["C7-o", "C0-o", "C2-o", "C1--o"]
    for ax, (name, lines) in zip(axes, panels.items(), strict=True):
        for style, (label, points) in zip(styles, lines.items(), strict=True):
            ax.loglog(*zip(*points, strict=True), style, label=label, markersize=4)
        ticks = sorted({size for points in lines.values() for size, _ in points})
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set(xlabel=name, ylabel="temporaries, MiB")
        ax.grid(alpha=0.3)
    drawing.legend(figure, axes[0])
    return figure
