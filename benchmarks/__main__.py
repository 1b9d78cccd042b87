"""Time the linear layer beside the naive formula and other libraries.

    python -m benchmarks [--quick] [--device cpu] [--only NAME] [--dtype NAME]

Every workload is a layer of a real model. Its forward pass, each gradient, and the
whole step are compiled ahead, checked against float64, and timed in turn with
each library that is installed. A row gives medians, quartiles, the median ratio of each
library's time to ours in the same round, and how far we are from the limit that the
fastest product and copy on this machine set. The results go to a JSON file, as they
come, and to plots. The last workload, "GPT step", is a training step of a whole model.
"""

import argparse
import pathlib

import jax
from rich.console import Console

from benchmarks import plots, pytorch, report, results_file
from benchmarks.ceilings import ceilings
from benchmarks.machine import describe
from benchmarks.measure import measure
from benchmarks.model import GPT_DTYPES, GPT_STEP
from benchmarks.overhead import overhead
from benchmarks.progress import Cells
from benchmarks.workloads import DECODING, DTYPES, GROWTH, MODES, QUICK, WORKLOADS


def main():
    parser = option_parser()
    options = parser.parse_args()
    cells = chosen_cells(options)
    if not cells:
        parser.error(f"no workload has a name with {options.only}, dtype and mode")
    path = options.output / "results.json"
    try:
        device = jax.devices(options.device)[0]
    except RuntimeError as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    seconds = options.seconds or (0.3 if options.quick else 3.0)
    now = describe(device) | {"seconds": seconds}
    if pytorch.is_timed(device, "float32"):
        now["PyTorch"] = pytorch.described()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        document = results_file.started(path, now, options.resume)
    except OSError as error:
        parser.error(f"argument --output: {options.output}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    # Tables need their width where the terminal does not say its own.
    console.width = max(console.width, 100)
    with jax.default_device(device):
        fill(document, remaining(cells, document), device, path, console)
    for table in report.tables(document):
        console.print(table)
    for doubt in results_file.doubts(results_file.rows_of(document)):
        console.print(f"[red]Something is wrong with this run:[/] {doubt}.")
    for written in [path, *plots.draw(document, options.output)]:
        console.print(f"written: {written}")
    if options.compare is not None:
        regressions = report.regressions(options.compare, document)
        console.print(regressions or "No regression.")
        raise SystemExit(1 if regressions else 0)


def fill(document, cells, device, path, console):
    """Measure the cells into the document, and write it after each measurement."""
    seconds = document["seconds"]
    weights = [1.0, 1.0, *map(weight_of, cells)]
    with Cells(console, weights) as progress:
        progress.begin("ceilings")
        limits = document.setdefault("ceilings", {})
        computed = dict.fromkeys(DTYPES[dtype][0] for _, dtype, _ in cells)
        missing = [dtype for dtype in computed if dtype not in limits]
        if missing:
            limits.update(ceilings(device, missing, seconds / 4))
        progress.finish("ceilings")
        progress.begin("overhead")
        if "overhead" not in document:
            document["overhead"] = overhead(seconds < 1)
        progress.finish("overhead")
        for workload, dtype, modes in cells:
            name = f"{workload.name}, {dtype}"
            progress.begin(name)
            for rows in measure(workload, dtype, modes, device, seconds, limits):
                document["results"] += [vars(row) for row in rows]
                results_file.write(document, path)
            progress.finish(name)
    results_file.write(document | {"complete": True}, path)


def weight_of(cell):
    """About how long a cell takes: large products cannot be timed often."""
    workload, _, modes = cell
    product = workload.rows * workload.in_features * workload.out_features
    return len(modes) * (1 + product / 2e9)


def remaining(cells, document):
    """The cells without the modes that the document has."""
    have = {row.cell for row in results_file.rows_of(document)}
    cells = [
        (w, d, [mode for mode in modes if (w.name, d, mode) not in have])
        for w, d, modes in cells
    ]
    return [cell for cell in cells if cell[2]]


def positive(text):
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number


def results(path):
    """The document of an option, which argparse refuses with the message."""
    try:
        return results_file.read(pathlib.Path(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option_parser():
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="three workloads, the whole step only")
    add("--device", choices=["cpu", "gpu", "tpu"], help="default: JAX's default")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="workloads with this in their name; may be repeated",
    )
    add("--dtype", action="append", choices=list(DTYPES), help="may be repeated")
    add("--mode", action="append", choices=list(MODES), help="may be repeated")
    add(
        "--seconds",
        type=positive,
        metavar="S",
        help="at most, for each program of a workload; less where its ratios are known"
        " to 0.6 %% earlier (default: 3, and 0.3 with --quick)",
    )
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("benchmark-results"),
        metavar="DIR",
        help="where results.json and the plots go",
    )
    add(
        "--compare",
        type=results,
        metavar="OLD.json",
        help="show regressions against earlier results; exit status 1 if there are any",
    )
    add(
        "--resume",
        action="store_true",
        help="keep what DIR/results.json has of a run that was stopped",
    )
    return parser


def chosen_cells(options):
    """(workload, dtype, modes) of all that is to be timed."""
    modes = options.mode or (["step"] if options.quick else list(MODES))
    dtypes = options.dtype or list(DTYPES)
    quick = options.quick and not options.only

    def is_chosen(workload):
        if quick:
            return workload.name in QUICK
        return not options.only or any(name in workload.name for name in options.only)

    cells = [(w, d, modes) for w in WORKLOADS if is_chosen(w) for d in dtypes]
    grown = [(w, d, ["step"]) for w in GROWTH if is_chosen(w) for d in dtypes]
    plain = [d for d in dtypes if d in ("float32", "bfloat16")]
    decoding = [(w, d, ["forward"]) for w in DECODING if is_chosen(w) for d in plain]
    model = [(GPT_STEP, d, ["step"]) for d in dtypes if d in GPT_DTYPES]
    model = model if is_chosen(GPT_STEP) else []
    others = grown + decoding + model
    return cells + [cell for cell in others if set(cell[2]) <= set(modes)]


if __name__ == "__main__":
    main()
