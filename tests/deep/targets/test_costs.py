"""Compiled for a GPU and a TPU that are not here: no costlier than the naive formula.

Both compilers come as packages and need no device:

    pip install 'jax[tpu]'
    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION
    pip install nvidia-cuda-nvcc-cu12
    python -m pytest tests/deep/targets

`python -m benchmarks.aot` prints the figures of any case, also for other devices.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.aot import kept, targets

ROOT = pathlib.Path(__file__).parents[3]
COSTS = ["kernels", "MiB", "temporary MiB"]
DTYPES = ["float32", "bfloat16", "mixed"]
LAYERS = [f"layer-{dtype}-{bias}" for dtype in DTYPES for bias in ("bias", "plain")]
MLPS = [f"mlp-{dtype}-bias" for dtype in DTYPES]
CASES = {
    "h100": [*LAYERS, *MLPS, "stack-mixed-bias"],
    # A stack takes minutes, float32 half a minute, and a layer three times as long as
    # for an H100: `benchmarks.aot` has the others.
    "v5e": [
        "layer-bfloat16-bias",
        "layer-mixed-plain",
        *(case for case in MLPS if "float32" not in case),
    ],
}
# (target, backend, case, cost): by how much ours may exceed the others, and why
_COTANGENT = "XLA keeps the loss's cotangent in float32 for the bias gradient's sum too"
_WIDE = "float32 weight gradients: 2 x 16 MiB a layer more to write and to read again"
_WHOLE = "a weight gradient is returned in float32, with no bfloat16 buffer to reuse"
_NOISE = "less than a tile of a bias"
_CASTS = "each bias is cast to float32, in which it is added, by a kernel of its own"
EXCEPTIONS = {
    ("h100", "triton", "mlp-mixed-bias", "MiB"): (48, _COTANGENT),
    ("h100", "triton", "mlp-mixed-bias", "temporary MiB"): (0.01, _NOISE),
    ("h100", "cublas", "mlp-mixed-bias", "temporary MiB"): (12, _WHOLE),
    ("h100", "triton", "stack-mixed-bias", "MiB"): (769, _WIDE),
    ("h100", "triton", "stack-mixed-bias", "temporary MiB"): (16.01, _WIDE),
    ("h100", "cublas", "stack-mixed-bias", "MiB"): (769, _WIDE),
    ("h100", "cublas", "stack-mixed-bias", "temporary MiB"): (0.01, _NOISE),
    ("v5e", "tpu", "mlp-mixed-bias", "temporary MiB"): (0.04, _NOISE),
    ("v5e", "tpu", "mlp-bfloat16-bias", "kernels"): (2, _CASTS),
    ("v5e", "tpu", "mlp-bfloat16-bias", "MiB"): (0.08, _CASTS),
}


def compiled(target, case, **cell):
    """The figures of ``case`` by backend and contender."""
    if why := targets.missing(target, cell.get("chips", 1)):
        pytest.skip(why)
    cell = {"target": target, "case": case} | cell
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot.worker", json.dumps(cell)],
        # Without the options of tests/conftest.py, which are for CPUs.
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = map(json.loads, result.stdout.splitlines())
    return {(row["backend"], row["contender"]): row for row in rows}


def measured(target, case):
    rows = compiled(target, case)
    for row in rows.values():
        row["MiB"] = row["bytes"] / 2**20
        row["temporary MiB"] = row["temporary_bytes"] / 2**20
    return rows


@pytest.mark.parametrize(
    ("target", "case"), [(target, case) for target in CASES for case in CASES[target]]
)
def test_costs_no_more_than_the_naive_formula_and_flax(target, case):
    rows = measured(target, case)
    more = {}
    for (backend, contender), row in rows.items():
        for cost in COSTS:
            excess = rows[backend, "ours"][cost] - row[cost]
            allowed, _ = EXCEPTIONS.get((target, backend, case, cost), (0, ""))
            if excess > allowed:
                more[backend, contender, cost] = excess
    assert not more


def test_products_and_their_arrays_are_counted():
    """What the test above compares is there: three products and their arrays."""
    row = measured("h100", "layer-bfloat16-plain")["triton", "naive"]
    x, weight, y = 4096 * 2048, 8192 * 2048, 4096 * 8192
    # Y from x and W, ∇X from G and W, ∇W from G and x, of two bytes an element.
    least = 2 * 3 * (x + weight + y) / 2**20
    assert (row["kernels"], row["MiB"]) == (3, least)
    assert row["flops"] == 3 * 2 * 4096 * 2048 * 8192


@pytest.mark.parametrize(
    ("target", "line", "temporaries", "moved"),
    [("h100", "unfenced", 0.72, 0.97), ("v5e", "fenced", 0.45, 0.85)],
)
def test_scanned_layers_in_a_checkpoint_need_less_than_the_naive_formula(
    target, line, temporaries, moved
):
    """Eight layers of float32 weights, in mixed precision, beside the naive formula."""
    cell = {"backends": ["triton"], "sizes": kept.LAYERS}
    [naive], [ours] = (
        compiled(
            target, "scanned-mixed-plain", **cell, contenders=[name], lines=[which]
        ).values()
        for name, which in (("naive", None), ("ours", line))
    )
    assert ours["temporary_bytes"] <= temporaries * naive["temporary_bytes"]
    assert ours["bytes"] <= moved * naive["bytes"]
    assert ours["flops"] == naive["flops"]


# Train steps over eight devices.

LAYOUTS = ["data", "fsdp", "tensor", "fsdp_tensor"]


def on_eight_chips(target, case, contenders, **cell):
    """The figures of each contender."""
    rows = compiled(target, case, chips=8, contenders=contenders, **cell)
    rows = {contender: row for (_, contender), row in rows.items()}
    return [rows[contender] for contender in contenders]


def by_kind(row):
    return {(kind, dtype): size for kind, dtype, size in row["collectives"]}


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize(
    ("layout", "axes"),
    [*((layout, "auto") for layout in LAYOUTS), ("fsdp_tensor", "explicit")],
)
def test_reduced_in_the_compute_dtype_it_is_the_naive_formula_to_the_byte(
    target, layout, axes
):
    """A stack of two-layer blocks under `scan` and `checkpoint`, in mixed precision."""
    naive, reduced, ours = on_eight_chips(
        target,
        "mlp-mixed-plain",
        ["naive", "ours, reduced", "ours"],
        layout=layout,
        axes=axes,
    )
    assert by_kind(reduced) == by_kind(naive)
    assert reduced["wire_bytes"] == naive["wire_bytes"]
    assert reduced["flops"] == ours["flops"] == naive["flops"]
    assert reduced["peak_bytes"] <= 1.02 * naive["peak_bytes"]
    # In float32 the gradients of weights are doubled and nothing else is: neither what
    # is gathered, nor, where layers are split, the sums of Y and of the gradient of x.
    of_weights = {"data": "all-reduce", "fsdp": "reduce-scatter"}
    of_weights["fsdp_tensor"] = "reduce-scatter"
    kind, sent = of_weights.get(layout), dict(by_kind(naive))
    if kind:
        sent[kind, "float32"] = sent.get((kind, "float32"), 0) + 2 * sent.pop(
            (kind, "bfloat16")
        )
    assert by_kind(ours) == sent


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("column-mixed-bias", "data"),
        ("column-mixed-bias", "fsdp"),
        ("row-bfloat16-bias", "tensor"),
        ("row-bfloat16-bias", "fsdp_tensor"),
    ],
)
def test_a_bias_adds_its_own_gradient_in_float32_and_no_more(target, case, layout):
    names = ["ours, reduced", "naive"]
    reduced, naive = map(by_kind, on_eight_chips(target, case, names, layout=layout))
    bias = (4096 if "column" in case else 1024) * 2

    def total(found, *kinds):
        return sum(size for (kind, _), size in found.items() if kind in kinds)

    assert total(reduced, "all-gather") == total(naive, "all-gather")
    kinds = "all-reduce", "reduce-scatter"
    # Once all of it where it is reduced, or a part where it is scattered.
    assert 0 <= total(reduced, *kinds) - total(naive, *kinds) <= bias


# On 64 chips of v5p XLA multiplies what it gathers piece by piece, and reads and writes
# the sums in between, also the naive formula's.
@pytest.mark.parametrize(("target", "fewest"), [("h100", 64), ("v5p", 256)])
def test_operations_and_bytes_of_a_chip_stay_as_they_are(target, fewest):
    figures = []
    for chips in (fewest, 1024):
        sizes = {"rows": 8192, "width": 2048, "hidden": 8192, "tensor": 4}
        found = compiled(
            target,
            "gpt-mixed-plain",
            chips=chips,
            layout="fsdp_tensor",
            sizes=sizes,
            contenders=["ours"],
        )
        figures += found.values()
    few, many = figures
    assert few["flops"] == many["flops"]
    assert many["bytes"] == pytest.approx(few["bytes"], rel=0.03)
