"""The benchmarks as a user runs them."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from benchmarks import __main__ as command
from benchmarks import (
    drawing,
    long_sums,
    measure,
    model,
    pages,
    peers,
    plots,
    report,
    results_file,
)
from benchmarks.machine import processor
from benchmarks.model import GPT, WITH_LOSS, model_programs
from benchmarks.results_file import AGAIN, OURS, Row, rows_of
from benchmarks.workloads import WORKLOADS, problem, work

ROOT = pathlib.Path(__file__).parents[2]
CPU = jax.devices("cpu")[0]


COMMAND = [sys.executable, "-m", "benchmarks", "--quick"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run_benchmarks(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def naive_row(ratio):
    """A result in which the naive formula takes ``ratio`` times our time."""
    numbers = {field.name: 1 for field in dataclasses.fields(Row)}
    cell = {"workload": "growth 256", "dtype": "float32", "mode": "step"}
    figures = {"ratio_low": ratio, "ratio": ratio, "ratio_high": ratio}
    return numbers | {"library": "naive formula"} | cell | figures


def test_results_are_a_table_and_json_and_plots_and_compared_with_older_ones(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"results": [naive_row(1000)]}))
    run = run_benchmarks(
        *("--only", "growth 256", "--only", "MLP", "--dtype", "float32"),
        *("--output", str(tmp_path), "--compare", str(old)),
    )
    assert run.returncode == 1, run.stderr
    assert "MLP, hidden layer" in run.stdout
    assert "regressions" in run.stdout
    document = json.loads((tmp_path / "results.json").read_text())
    described = {"device", "cpu", "date", "versions", "commit", "tree is clean"}
    assert described | {"ceilings", "overhead"} < document.keys()
    assert document["complete"]
    for count in ("3 of 4", "4 of 4"):  # On a pipe a line for each cell.
        assert f"{count}, about " in run.stdout
    rows = document["results"]
    assert {row["workload"] for row in rows} >= {"growth 256", "MLP, hidden layer"}
    libraries = {row["library"] for row in rows if row["workload"] != "growth 256"}
    assert libraries >= {"jaxlinear", "naive formula", "Flax NNX", "Flax Linen"}
    for row in rows:
        assert row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["ratio"] > 0
        assert 0 < row["relative_error"] < 0.05
    for name in ("ratio.png", "roofline.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_rows_of_8_bits_stand_beside_bfloat16_and_keep_half_the_bytes(tmp_path):
    run = run_benchmarks(
        *("--only", "MLP", "--dtype", "float8", "--dtype", "int8"),
        *("--output", str(tmp_path)),
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    for dtype in ("float8", "int8"):
        by_library = {row["library"]: row for row in rows if row["dtype"] == dtype}
        ours, naive = by_library["jaxlinear"], by_library["naive formula"]
        assert ours["kept_bytes"] <= 0.52 * naive["kept_bytes"]
        # The others are in bfloat16.
        assert naive["relative_error"] < 9e-3 < ours["relative_error"]
        assert f"time: {dtype}, step; the others compute in bfloat16" in run.stdout


def test_bars_of_the_ratios_start_at_one():
    document = results_file.read(pages.RESULTS / "native.json")
    rows = [r for r in rows_of(document) if r.mode == "step" and r.ratio != 1]
    axes = plots.ratio(rows, document).axes
    bars = [bar for ax in axes for bar in ax.patches]
    ends = sorted(bar.get_x() + bar.get_width() for bar in bars)
    assert {bar.get_x() for bar in bars} == {1}
    others = {row.library for row in rows} - {OURS, AGAIN}
    assert ends == pytest.approx(sorted(r.ratio for r in rows if r.library in others))


def luminance(colour):
    """As WCAG 2 defines it."""
    channels = np.array(to_rgb(colour))
    low, high = channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
    return np.dot([0.2126, 0.7152, 0.0722], np.where(channels <= 0.04045, low, high))


@pytest.mark.parametrize("background", drawing.BACKGROUNDS)
def test_colours_of_plots_are_seen_on_light_and_dark_pages(background):
    for colour in drawing.COLOURS:
        low, high = sorted([luminance(colour), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 3


def test_plots_are_narrow_and_transparent(tmp_path):
    def plot():
        figure, [ax] = drawing.stacked(1, 2)
        ax.plot([1, 2])
        return figure

    drawing.save(tmp_path / "plot.png", plot)
    picture = imread(tmp_path / "plot.png")
    assert picture.shape[1] == 200 * drawing.WIDTH
    assert {*picture[0, :, 3]} == {0}


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
        (["--compare", "missing.json"], "--compare: missing.json: No such file"),
        (["--compare", str(ROOT)], f"--compare: {ROOT}: Is a directory"),
        (["--compare", str(ROOT / "LICENSE")], "LICENSE: no JSON"),
        (["--dtype", "int4"], "--dtype: invalid choice"),
        (["--device", "tpu"], "--device: "),
        (["--output", str(ROOT / "LICENSE")], "LICENSE: File exists"),
    ],
    ids=["workload", "file", "folder", "text", "dtype", "device", "output"],
)
def test_wrong_options_are_refused_before_anything_is_timed(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    monkeypatch.setattr(command, "fill", None)
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
    # A folder for results may be there, for the wrong device an empty one.
    assert not [*tmp_path.rglob("*.json")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"results": [', "no JSON"),
        ("[1]", "no results of benchmarks"),
        ('{"name": "other"}', "no results of benchmarks"),
        ('{"results": [{"ratio": 1}]}', "no results of benchmarks"),
        ('{"results": []}', "of another device"),
    ],
    ids=["corrupted", "list", "foreign", "incomplete row", "another machine"],
)
def test_a_file_that_cannot_be_gone_on_with_is_refused_and_kept(
    text, message, tmp_path
):
    path = tmp_path / "results.json"
    path.write_text(text)
    now = dict.fromkeys(results_file.MUST_AGREE, "here")
    with pytest.raises(ValueError, match=message):
        results_file.started(path, now, resume=True)
    assert path.read_text() == text


def wrong(parameters, x, dtype):
    return 1.001 * peers.naive(parameters, x, dtype)


@pytest.mark.parametrize("library", ["jaxlinear", "naive formula"])
def test_a_wrong_peer_is_not_timed(library, monkeypatch):
    layers = {"jaxlinear": peers.ours, library: wrong}
    monkeypatch.setattr(measure, "jax_peers", lambda: layers)
    monkeypatch.setattr(measure.pytorch, "is_timed", lambda *arguments: False)
    workload = next(w for w in WORKLOADS if w.name == "MLP, hidden layer")
    message = f"MLP, hidden layer, float32, step: Y of {library} .* bound "
    allowed = jax.numpy_rank_promotion("allow")  # As the naive formula is written.
    arguments = workload, "float32", ["step"], jax.devices()[0], 0.01, {}
    with allowed, pytest.raises(ArithmeticError, match=message):
        next(measure.measure(*arguments))


TINY = GPT(layers=1, in_features=32, heads=2, tokens=8, batch=2, out_features=64)


def test_a_wrong_layer_of_a_whole_model_is_not_timed(monkeypatch):
    layers = {"jaxlinear": wrong, "naive formula": peers.naive}
    monkeypatch.setattr("benchmarks.model.jax_peers", lambda: layers)
    allowed = jax.numpy_rank_promotion("allow")
    with allowed, pytest.raises(ArithmeticError, match=r"GPT step, .* of jaxlinear"):
        model_programs(TINY, "float32", "float32", jax.devices()[0])


def test_a_wrong_loss_of_a_whole_model_is_not_timed(monkeypatch):
    def wrong(parameters, h, labels, dtype):
        return 1.001 * without_logits(parameters, h, labels, dtype)

    without_logits = model.without_logits
    monkeypatch.setattr(model, "without_logits", wrong)
    allowed = jax.numpy_rank_promotion("allow")
    with allowed, pytest.raises(ArithmeticError, match=f"loss of {WITH_LOSS} is wrong"):
        model_programs(TINY, "float32", "float32", jax.devices()[0])


def test_the_table_of_a_model_has_its_loss_where_it_was_measured():
    def table(loss):
        row = naive_row(1) | {"workload": "GPT step", "loss": loss}
        return pages.model({"results": [row]})[0]

    assert "loss" not in table(None)
    assert table(9.125).splitlines()[-1].endswith("| 9.12500 |")


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        ("model name\t: A\nflags\t: fpu avx2 avx512f avx512_bf16", "A", 3),
        ("model name\t: B\nflags\t: fpu avx avx2", "B", 1),
        ("Features\t: fp asimd bf16", None, 1),
    ],
    ids=["with bfloat16", "without", "Arm"],
)
def test_a_processor_is_described(text, model, features, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(text + "\n")
    found = processor(file)
    assert model in (None, found["model"])
    assert len(found["features"]) == features
    assert processor(tmp_path / "none")["features"] is None


def test_the_figures_of_a_page_are_written_and_checked(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter\n")
    monkeypatch.setattr(pages, "PAGES", [page])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pages", *arguments])
        pages.main()

    with pytest.raises(SystemExit, match="1"):
        run("--check")
    assert "-old" in capsys.readouterr().out.splitlines()
    run()
    run("--check")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| MLP, hidden layer (128 × 784 → 256) " in text


def test_a_page_with_half_of_the_marks_is_refused():
    with pytest.raises(ValueError, match=r"has not <!-- a: begin --> and <!-- a: end"):
        pages.written("<!-- a: begin -->", {"a": "new"})


def test_a_figure_that_is_older_than_the_products_says_so():
    fresh = results_file.read(pages.RESULTS / "native.json")
    older = fresh | {"older": "its products"}
    said = "**older than its products**"
    for shown in (pages.caption, lambda document: pages.means([document])):
        assert said in shown(older)
        assert "older" not in shown(fresh)


def test_a_row_of_the_results_is_a_line(tmp_path):
    path = tmp_path / "results.json"
    document = {"device": "CPU", "results": [naive_row(1), naive_row(2)], "none": []}
    results_file.write(document, path)
    assert json.loads(path.read_text()) == document
    lines = path.read_text().splitlines()
    assert [line for line in lines if '"ratio"' in line] == lines[3:5]
    assert len(lines) == 8


def test_the_work_of_a_step_is_that_of_its_products():
    workload = WORKLOADS[0]
    arrays = problem(workload, "float32")
    flops, least_bytes = work(workload, "step", arrays)
    product = 2 * 1 * 1024 * 4096
    assert flops == pytest.approx(3 * product, rel=0.01)
    # x, weight, bias and the cotangent are read; as much is written as gradients and Y.
    assert least_bytes == 2 * sum(array.nbytes for array in arrays)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    chosen = "--only", "growth 256", "--only", "growth 1024", "--dtype", "float32"
    chosen += "--output", str(tmp_path)
    run = subprocess.Popen(
        [*COMMAND, *chosen],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    with run.stdout:
        assert any("growth 256, float32" in line for line in run.stdout)
        run.send_signal(signal.SIGKILL)
        run.wait()
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    assert not document["complete"]
    document["results"][0]["median_s"] = 1234.5
    path.write_text(json.dumps(document))
    again = run_benchmarks(*chosen, "--resume")
    assert again.returncode == 0, again.stderr
    assert "growth 256, float32" not in again.stdout
    document = json.loads(path.read_text())
    assert document["complete"]
    assert document["results"][0]["median_s"] == 1234.5
    cells = [(row["workload"], row["library"]) for row in document["results"]]
    assert len(cells) == len(set(cells))
    assert ("growth 1024", "jaxlinear") in cells
    assert [*tmp_path.glob(".results*")] == []


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_step_of_a_whole_model_is_checked_and_has_its_bytes(dtype):
    compute_dtype = {"float32": "float32", "mixed": "bfloat16"}[dtype]
    allowed = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with allowed[0], allowed[1]:
        checked = model_programs(TINY, dtype, compute_dtype, jax.devices()[0])
        losses = [program.call()[0] for program in checked[0].values()]
    programs, errors, flops, least_bytes = checked
    assert {"jaxlinear", WITH_LOSS, "naive formula", "Flax NNX"} <= programs.keys()
    assert errors.keys() == programs.keys()
    assert [program.loss for program in programs.values()] == pytest.approx(
        [*map(float, losses)], rel=1e-6
    )
    linear = 12 * 32**2 + 32 * 64
    assert (flops, least_bytes) == (6 * linear * 16, 8 * linear)
    assert all(map(jnp.isfinite, losses))
    for program in programs.values():
        assert 0 < program.temporary_bytes < program.peak_bytes


def test_sums_in_blocks_are_those_of_the_product():
    name, *errors, in_a_loop, written_out = long_sums.row((16, 1024, 8), CPU, False)
    assert name == "16 × 1024 → 8"
    of_forms = [float(error) for error in errors[: len(long_sums.FORMS)]]
    assert all(0 < error < 1e-6 for error in of_forms)
    assert of_forms[1] < of_forms[0]  # Shorter sums are more accurate.
    assert int(in_a_loop) <= int(written_out)
