"""The results file: its rows, written after each measurement and read to go on."""

import dataclasses
import json
import os

import numpy as np

from benchmarks.timing import ratios
from jaxlinear.inspect._json import as_json

OURS = "jaxlinear"
NAIVE = "naive formula"
AGAIN = "naive formula / itself"
"""Compiled and timed once more: its ratio to ``NAIVE`` shows what the clock adds."""

QUIET_CORES = 0.1
FAIR = 0.02
"""What the naive formula may be off beside itself."""

MUST_AGREE = "device", "cpu", "settings", "versions", "commit", "seconds"
"""What a run must have in common with the file that it goes on with."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One library at one workload, dtype and mode.

    Times are in seconds, as quartiles of the rounds, with the ratio to ours in a round,
    but of ``AGAIN`` to ``NAIVE``.
    """

    workload: str
    rows: int
    in_features: int
    out_features: int
    dtype: str
    compute_dtype: str
    mode: str
    library: str
    median_s: float
    low_s: float
    high_s: float
    rounds: int
    ratio_low: float
    ratio: float
    ratio_high: float
    flops_per_s: float
    bytes_per_s: float
    least_bytes: int
    share_of_limit: float
    relative_error: float
    peak_bytes: int | None
    compile_s: float | None
    temporary_bytes: int | None
    kept_bytes: int | None  # From the forward to the backward pass.
    loss: float | None = None  # Of a model's step.
    others_cores: float | None = None  # What other processes used meanwhile.

    # Older files do not have the last two.

    @property
    def cell(self):
        return self.workload, self.dtype, self.mode


def rows_of(document):
    return [Row(**row) for row in document["results"]]


def figures(samples, library):
    """The fields of a row that come from the rounds of an interleaved measurement."""
    times, base = samples[library], samples[NAIVE if library == AGAIN else OURS]
    quartiles = 0.25, 0.5, 0.75
    low, median, high = map(float, np.quantile(times, quartiles))
    found = np.quantile(ratios(times, base), quartiles)
    ratio_low, ratio, ratio_high = map(float, found)
    return {
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "rounds": len(times),
        "ratio_low": ratio_low,
        "ratio": ratio,
        "ratio_high": ratio_high,
    }


def doubts(rows):
    """What is wrong with a run, in words: nothing if it is good.

    Other processes, results faster than the fastest product and copy, and the naive
    formula beside itself.
    """
    found = []
    loaded = [r.others_cores for r in rows if (r.others_cores or 0) > QUIET_CORES]
    if loaded:
        cells = f"{len(loaded)} of {len(rows)} rows"
        found.append(f"other processes used up to {max(loaded):.1f} cores in {cells}")
    beyond = [row.share_of_limit for row in rows if row.share_of_limit > 1]
    if beyond:
        most = f"{max(beyond):.0%} of the limit of this machine"
        cells = f"{len(beyond)} of {len(rows)} rows"
        found.append(f"{cells} reach more than 100 %, up to {most}")
    beside = [row.ratio for row in rows if row.library == AGAIN]
    far = [ratio for ratio in beside if abs(ratio - 1) > FAIR]
    if far:
        cells = f"{len(far)} of {len(beside)} cells"
        range_ = f"{min(far):.2f} to {max(far):.2f}"
        found.append(f"the naive formula takes {range_} of its own time in {cells}")
    return found


def read(path):
    """The document in a results file; ValueError, in one line, if it has none."""
    try:
        document = json.loads(path.read_text())
        rows_of(document)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # Neither JSON nor text.
        raise ValueError(f"{path}: no JSON ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no results of benchmarks ({error!r})") from None
    return document


def write(document, path):
    """Replace the file at once: whoever stops the run leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(as_json(document) + "\n")
    os.replace(temporary, path)


def started(path, now, resume):
    """The document to fill: ``now``, or with ``resume`` the one in the file.

    ValueError if the file is not a results file, which would be lost, or if this run
    cannot go on with it.
    """
    old = read(path) if path.exists() else None
    if old is None or not resume:
        return now | {"complete": False, "results": []}
    different = [name for name in MUST_AGREE if old.get(name) != now[name]]
    if different:
        raise ValueError(
            f"{path}: cannot go on with it, of another {' and '.join(different)}"
        )
    return old | {"complete": False}
