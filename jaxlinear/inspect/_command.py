"""The command ``python -m jaxlinear``: the accuracy of this machine."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import sys

import jax

from jaxlinear._op.cpu import NATIVE, bfloat16_form
from jaxlinear.inspect._accuracy import FEATURES, ROWS, measured
from jaxlinear.inspect._json import as_json
from jaxlinear.inspect._loss_accuracy import CLASSES, measured_losses
from jaxlinear.inspect._rounding import rounding
from jaxlinear.inspect._table import table


def main():
    options = _options()
    device = jax.devices()[0]
    measurements = [*measured(device), *measured_losses(device)]
    if options.json == "-":
        print(_as_json(measurements, device))
    else:
        print(_as_text(measurements, device))
    if options.json not in (None, "-"):
        pathlib.Path(options.json).write_text(_as_json(measurements, device))
    if options.png:
        _draw(measurements, device, options.png)
    ours = (m for m in measurements if m.layer == "jaxlinear")
    return int(not all(m.is_explained for m in ours))


def _name(device):
    """Its name, and that of a CPU with what decides about bfloat16 products."""
    if device.platform != "cpu":
        return device.device_kind
    has = "with" if bfloat16_form() == NATIVE else "without"
    return f"CPU {has} bfloat16 instructions"


def _options():
    parser = argparse.ArgumentParser(
        prog="python -m jaxlinear",
        description="Compare each product of a linear layer with float64 on this"
        " machine. Exits with 1 if an error of ours is more than rounding explains.",
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON, or print it"
    )
    parser.add_argument(
        "--png",
        nargs="?",
        const="accuracy.png",
        metavar="FILE",
        help="draw a heat map (default: accuracy.png); needs matplotlib",
    )
    options = parser.parse_args()
    if options.json not in (None, "-"):
        _check_writable(parser, "--json", options.json)
    if options.png:
        if not importlib.util.find_spec("matplotlib"):
            parser.error("--png needs matplotlib: pip install matplotlib")
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        suffixes = FigureCanvasAgg.filetypes
        if pathlib.Path(options.png).suffix[1:].lower() not in suffixes:
            known = ", ".join(sorted(suffixes))
            parser.error(f"--png: {options.png} must end in one of {known}")
        _check_writable(parser, "--png", options.png)
    return options


def _check_writable(parser, option, name):
    """Refuse what could not be written after twenty seconds of work."""
    file = pathlib.Path(name).absolute()
    if file.is_dir():
        parser.error(f"{option}: {name} is a folder")
    if not file.parent.is_dir():
        parser.error(f"{option}: the folder of {name} does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        parser.error(f"{option}: {name} cannot be written")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cells(measurements):
    """The rows and columns of the table, and the measurement of each cell."""
    cells = {((m.dtype, m.quantity), (m.layer, m.precision)): m for m in measurements}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    return rows, columns, cells


def _as_text(measurements, device):
    rows, columns, cells = _cells(measurements)

    def cell(row, column):
        found = cells.get((row, column))
        if found is None:  # Only our layer has 8 bits.
            return "– "
        return f"{found.error:.1e}{' ' if found.is_explained else '!'}"

    lines = [
        f"Relative errors against float64, {_name(device)}, JAX {jax.__version__}"
        f" ({ROWS} rows, {FEATURES} features, and {CLASSES} classes of the loss; mixed:"
        " float32 arguments, bfloat16 compute; float8: FLOAT8, int8: INT8, of float32"
        " arguments):",
        "",
        table(
            ["", *map(", ".join, columns)],
            [
                [" ".join(row), *(cell(row, column) for column in columns)]
                for row in rows
            ],
        ),
        "",
        "!: more than rounding to the dtype of the result explains.",
        *_roundings(device),
    ]
    if not any(m.layer == "Flax" for m in measurements):
        lines.append("Flax is not installed: its layer is left out.")
    return "\n".join(lines)


def _roundings(device):
    """What the device rounds beside that, which is explained as well."""
    default = rounding(device, "float32")
    if default.roundoff:
        yield (
            "default: this device rounds the operands of float32 products to"
            f" {default.operands}; highest: it does not."
        )
    if default.is_y_rounded_before_bias:
        yield "On GPUs Y is rounded before the bias is added, and after."


def _as_json(measurements, device):
    document = {
        "device": _name(device),
        "default_precision": rounding(device, "float32").operands,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "flax": _version("flax"),
        "rows": ROWS,
        "features": FEATURES,
        "classes": CLASSES,
        "measurements": [
            {**dataclasses.asdict(m), "is_explained": m.is_explained}
            for m in measurements
        ],
    }
    return as_json(document)


def _draw(measurements, device, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    rows, columns, cells = _cells(measurements)
    excess = [
        [
            cells[r, c].error / cells[r, c].explained if (r, c) in cells else math.nan
            for c in columns
        ]
        for r in rows
    ]
    figure, axes = pyplot.subplots(
        figsize=(2 + 1.1 * len(columns), 1 + 0.35 * len(rows))
    )
    image = axes.imshow(excess, norm=LogNorm(0.01, 100), cmap="RdYlGn_r", aspect="auto")
    axes.set_xticks(range(len(columns)), ["\n".join(column) for column in columns])
    axes.set_yticks(range(len(rows)), [" ".join(row) for row in rows])
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (row, column) in cells:
                error = f"{cells[row, column].error:.1e}"
                axes.text(x, y, error, ha="center", va="center")
    axes.set_title(f"Relative error against float64, {_name(device)}")
    figure.colorbar(image, label="error / error that rounding explains")
    figure.savefig(file, dpi=150, bbox_inches="tight")
