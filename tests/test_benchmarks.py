"""The benchmarks as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import contenders, report
from benchmarks.timing import repeated_on_device
from benchmarks.workloads import WORKLOADS, problem, work

ROOT = pathlib.Path(__file__).parent.parent


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


def naive_row(ratio):
    """A result in which the naive formula takes ``ratio`` times our time."""
    cell = {"workload": "growth 4", "dtype": "bfloat16", "mode": "step"}
    figures = {"ratio_low": ratio, "ratio": ratio, "ratio_high": ratio}
    return {"library": "naive formula"} | cell | figures


def test_results_are_a_table_and_json_and_plots_and_compared_with_older_ones(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"results": [naive_row(1000)]}))
    run = run_benchmarks(
        *("--only", "growth 4", "--only", "MLP", "--dtype", "bfloat16"),
        *("--output", str(tmp_path), "--compare", str(old)),
    )
    assert run.returncode == 1, run.stderr
    assert "MLP, hidden layer" in run.stdout
    assert "regressions" in run.stdout
    document = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "date", "versions", "ceilings", "overhead"} < document.keys()
    rows = document["results"]
    assert {row["workload"] for row in rows} >= {"growth 4", "MLP, hidden layer"}
    libraries = {row["library"] for row in rows if row["workload"] != "growth 4"}
    assert libraries >= {"jaxlinear", "naive formula", "Flax NNX", "Flax Linen"}
    for row in rows:
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["ratio"] > 0
        assert 0 < row["relative_error"] < 0.05
    for name in ("ratio.png", "roofline.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("before", "now", "found"), [(2, 1, 1), (2, 2, 0), (1, 2, 0)])
def test_a_regression_is_a_lead_that_has_shrunk(before, now, found):
    old, new = {"results": [naive_row(before)]}, {"results": [naive_row(now)]}
    table = report.regressions(old, new)
    assert (table.row_count if table else 0) == found


def test_a_regression_within_the_spread_is_none():
    old = {"results": [naive_row(2) | {"ratio_low": 1.5}]}
    new = {"results": [naive_row(1.8)]}
    assert report.regressions(old, new) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no such workload"], "no workload has a name with"),
        (["--compare", "missing.json"], "missing.json"),
        (["--dtype", "int8"], "invalid choice"),
    ],
    ids=["workload", "file", "dtype"],
)
def test_wrong_options_are_refused_before_anything_is_timed(arguments, message):
    run = run_benchmarks(*arguments)
    assert run.returncode != 0
    assert message in run.stderr


def test_a_wrong_answer_is_not_timed(monkeypatch):
    def wrong(weight, bias, dtype):
        apply, parameters = contenders.naive(weight, bias, dtype)
        return lambda parameters, x: 1.1 * apply(parameters, x), parameters

    monkeypatch.setattr(benchmarks, "jax_contenders", lambda: {"jaxlinear": wrong})
    monkeypatch.setattr(benchmarks, "pytorch_runs", lambda *arguments: False)
    workload = next(w for w in WORKLOADS if w.name == "MLP, hidden layer")
    allowed = jax.numpy_rank_promotion("allow")  # As the naive formula is written.
    with allowed, pytest.raises(ArithmeticError, match="wrong"):
        benchmarks.measure(
            workload, "float32", ["forward"], jax.devices()[0], 0.01, None
        )


def test_the_work_of_a_step_is_that_of_its_products():
    workload = WORKLOADS[0]
    arrays = problem(workload, "float32")
    flops, least_bytes = work(workload, "step", arrays)
    product = 2 * 1 * 1024 * 4096
    assert flops == pytest.approx(3 * product, rel=0.01)
    # x, weight, bias and the cotangent are read; as much is written as gradients and Y.
    assert least_bytes == 2 * sum(array.nbytes for array in arrays)


def test_repetition_on_a_device_computes_the_function_each_time():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return 2 * x

    repeated = repeated_on_device(counted, (jnp.ones(3),))
    assert repeated(5).tolist() == [2, 2, 2]
    jax.effects_barrier()
    assert len(calls) == 5
