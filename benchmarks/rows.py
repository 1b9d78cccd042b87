"""A row of the results: one library at one workload, dtype and mode."""

import dataclasses

import numpy as np

OURS = "jaxlinear"

_OLD_NAMES = {"in": "in_features", "out": "out_features"}


@dataclasses.dataclass(frozen=True)
class Row:
    """Times in seconds as quartiles of the rounds, and the ratio to ours in a round."""

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
    temporary_bytes: int | None = None  # Older results have none.
    kept_bytes: int | None = None  # Nor this, from the forward to the backward pass.

    @property
    def cell(self):
        return self.workload, self.dtype, self.mode


def rows_of(document):
    """The rows of a results file, of an older one too."""
    return [_row(dict(row)) for row in document["results"]]


def _row(values):
    for old, new in _OLD_NAMES.items():
        if old in values:
            values[new] = values.pop(old)
    return Row(**values)


def figures(samples, library):
    """The fields of a row that come from the rounds of an interleaved measurement.

    A slow library has fewer rounds than ours: it is compared in those that they share.
    """
    times, ours = samples[library], samples[OURS]
    shared = min(len(times), len(ours))
    ratios = times[:shared] / ours[:shared]
    low, median, high = map(float, np.quantile(times, [0.25, 0.5, 0.75]))
    ratio_low, ratio, ratio_high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    return {
        "median_s": median,
        "low_s": low,
        "high_s": high,
        "rounds": len(times),
        "ratio_low": ratio_low,
        "ratio": ratio,
        "ratio_high": ratio_high,
    }
