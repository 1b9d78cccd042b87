"""The benchmark of the loss: its parts at small sizes, and the committed figures."""

import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("optax")

from loss_oracle import exact_loss, exact_loss_gradients

from benchmarks import loss
from benchmarks.aot import account, losses, plots, steps
from benchmarks.aot.__main__ import compiled
from benchmarks.checks import relative_error
from benchmarks.model import WITH_LOSS
from benchmarks.results_file import OURS

SMALL = {"rows": 1024, "width": 32, "classes": 2048}
OTHERS = [name for name in loss.CONTENDERS if name != "tokamax"]
PRODUCTS = {"unfused": 3, "naive": 3, "ours": 3, "ours, per token": 4}
SHARES = {"ours": 0.6, "ours, per token": 0.15}
"""The largest share of the temporaries of the loss with logits, at the large size."""


def rows_of(program, dtype, contenders=OTHERS, **more):
    cell = loss.cell("cpu", program, dtype, contenders=contenders, sizes=SMALL, **more)
    rows, why = compiled(cell)
    assert why is None
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize(
    ("program", "dtype"),
    [("loss", "float32"), ("loss", "mixed"), ("loss_value", "mixed")],
)
def test_a_mean_takes_three_products_a_loss_per_token_four_and_a_value_one(
    program, dtype
):
    one = 2 * np.prod([*SMALL.values()])
    rows = rows_of(program, dtype)
    assert [*rows] == OTHERS
    for name, row in rows.items():
        assert row["flops"] == one * (PRODUCTS[name] if program == "loss" else 1)
    for name in SHARES:
        unfused = rows["unfused"]["temporary_bytes"]
        assert rows[name]["temporary_bytes"] < 0.6 * unfused


@pytest.mark.parametrize(
    ("program", "contenders"), [("loss", OTHERS), ("loss_value", ["unfused", "ours"])]
)
def test_contenders_are_timed_in_turn_after_a_check(program, contenders):
    rows = rows_of(program, "mixed", contenders, seconds=0.001)
    assert [*rows] == contenders
    assert rows["unfused"]["to unfused"] == 1
    results = losses.RESULTS if program == "loss" else ["loss"]
    for row in rows.values():
        assert row["median_s"] > 0
        assert [*row["errors"]] == results
        assert 0 < max(row["errors"].values()) < 0.01


def test_a_wrong_loss_is_not_timed(monkeypatch):
    def wrong(h, weight, labels, dtype):
        return losses.unfused(h, weight[:-1], labels, dtype)

    monkeypatch.setitem(losses.CONTENDERS, "ours", wrong)
    sizes = SMALL | {"rows": 64}
    more = {"contenders": ["ours"], "sizes": sizes, "seconds": 0.001}
    cell = loss.cell("cpu", "loss", "float32", **more)
    with pytest.raises(ArithmeticError, match="loss of ours is wrong"):
        [*losses.timed_rows(cell)]


def test_the_results_to_compare_with_are_right():
    arrays = losses.drawn(losses.Sizes(rows=700, width=8, classes=50))
    exact = exact_loss(*arrays), *exact_loss_gradients(*arrays)[:2]
    found = losses.exact_results(*arrays, "float32")
    assert len(arrays[0]) > losses.ROWS
    for actual, expected in zip(found, exact, strict=True):
        assert relative_error(actual, expected) < 1e-14


def test_tokamax_counts_the_columns_that_fill_its_last_block():
    """`pip install tokamax==0.0.17`; 2,049 classes are two blocks of 2,048 there."""
    pytest.importorskip("tokamax")
    more = {"contenders": ["unfused", "tokamax"], "seconds": 0.001}
    sizes = SMALL | {"classes": 2049}
    _, why = compiled(loss.cell("cpu", "loss", "float32", **more, sizes=sizes))
    assert "loss of tokamax is wrong" in why


def test_without_tokamax_its_rows_are_missing_and_the_command_says_so(
    monkeypatch, tmp_path, capsys
):
    ran = []

    def run(cells, folder, console):
        ran.extend(cells)
        return []

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(loss, "rows_of_all", run)
    monkeypatch.setattr(loss, "RESULTS", tmp_path / "loss.json")
    monkeypatch.setattr(sys, "argv", ["loss", "--times"])
    loss.main()
    assert "tokamax is not installed" in capsys.readouterr().out
    assert ran == [*loss.timed_cells()]
    assert [cell["contenders"] for cell in ran] == [OTHERS] * 4
    document = json.loads((tmp_path / "loss.json").read_text())
    assert {"timed", "times"} == document.keys()


@pytest.fixture(scope="module")
def document():
    return json.loads(loss.RESULTS.read_text())


@pytest.mark.parametrize("target", loss.TARGETS)
@pytest.mark.parametrize("dtype", loss.DTYPES)
def test_committed_programs_have_the_products_and_the_share_of_memory(
    document, target, dtype
):
    for sizes in (loss.SMALL, loss.LARGE):
        fields = {"target": target, "sizes": sizes}
        found = loss.chosen(document["rows"], "loss", dtype, **fields)
        rows = {row["contender"]: row for row in found}
        assert [*rows] == [*loss.CONTENDERS]
        one = 2 * np.prod([*sizes.values()])
        assert {name: rows[name]["flops"] / one for name in PRODUCTS} == PRODUCTS
    for name, share in SHARES.items():
        unfused = rows["unfused"]["temporary_bytes"]
        assert rows[name]["temporary_bytes"] <= share * unfused


def test_a_step_of_a_gpt_takes_less_memory_without_its_logits_on_a_cpu(document):
    for dtype, sizes in itertools.product(loss.DTYPES, loss.STEPS):
        fields = {"target": "cpu", "sizes": sizes}
        found = loss.chosen(document["gpt"], "gpt_step", dtype, **fields)
        logits, ours = found
        gpt = steps.Sizes(**sizes).gpt
        assert (logits["contender"], ours["contender"]) == (OURS, WITH_LOSS)
        assert logits["flops"] == ours["flops"]
        saved = logits["temporary_bytes"] - ours["temporary_bytes"]
        assert saved > 1.5 * 4 * gpt.rows * gpt.out_features


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        ([], ["rows", "gpt", "times"]),
        (["--compiled"], ["rows"]),
        (["--gpt"], ["gpt"]),
        (["--times"], ["times"]),
    ],
    ids=str,
)
def test_an_option_measures_only_its_part(option, keys, monkeypatch, tmp_path):
    monkeypatch.setattr(loss, "rows_of_all", lambda *arguments: [])
    monkeypatch.setattr(loss, "RESULTS", tmp_path / "loss.json")
    monkeypatch.setattr(sys, "argv", ["loss", *option])
    loss.main()
    document = json.loads((tmp_path / "loss.json").read_text())
    assert [key for key in document if document[key] == []] == keys


def test_tables_have_a_line_for_each_contender_and_the_times_if_there_are_any(
    document,
):
    document = document | {"times": [], "timed": document}
    without = loss.of_sizes(document, loss.SMALL).splitlines()
    lines = len(loss.CONTENDERS) * len(loss.PROGRAMS) * len(loss.DTYPES)
    assert len(without) == 2 + lines
    errors = dict.fromkeys(losses.RESULTS, 1e-7)
    time = {"median_s": 1, "to unfused": 0.875, "errors": errors}
    document["times"] = [
        cell | {"contender": contender} | time
        for cell in loss.timed_cells()
        for contender in loss.CONTENDERS
    ]
    timed = loss.of_sizes(document, loss.SMALL).splitlines()
    assert all("0.88" in line for line in timed[2:])
    assert loss.TIMED[1] not in without[0]
    assert loss.TIMED[1] in timed[0]
    assert ", timed on " in loss.caption(document)


def test_the_picture_has_every_vocabulary_and_starts_at_zero(document):
    figure = plots.against_vocabulary(loss.panels(document["rows"]))
    assert [panel.get_title() for panel in figure.axes] == loss.DTYPES
    for panel in figure.axes:
        assert [[*line.get_xdata()] for line in panel.lines] == [loss.VOCABULARIES] * 3
        assert panel.get_xlim()[0] == panel.get_ylim()[0] == 0


NESTED = """HloModule nested, num_partitions=1

%inner (w: f32[64,1024], at: s32[]) -> f32[64,16] {
  %w = f32[64,1024]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[64,16]{1,0} dynamic-slice(%w, %zero, %at), dynamic_slice_sizes={64,16}
}

%outer (x: f32[8,64], v: f32[64,1024], place: s32[]) -> f32[8,16] {
  %x = f32[8,64]{1,0} parameter(0)
  %v = f32[64,1024]{1,0} parameter(1)
  %place = s32[] parameter(2)
  %part = f32[64,16]{1,0} fusion(%v, %place), kind=kLoop, calls=%inner
  ROOT %dot = f32[8,16]{1,0} dot(%x, %part), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: f32[8,64], b: f32[64,1024], c: s32[]) -> f32[8,16] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[64,1024]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %found = f32[8,16]{1,0} fusion(%a, %b, %c), kind=kOutput, calls=%outer
}
"""  # noqa: E501


def test_of_an_array_that_an_inner_fusion_slices_only_the_slice_is_read():
    found = account.account(NESTED)
    assert (found.kernels, found.flops) == (1, 2 * 8 * 64 * 16)
    assert found.bytes == 4 * (8 * 64 + 64 * 16 + 8 * 16 + 1)


ALONE = """HloModule sliced, num_partitions=1

ENTRY %main (w: f32[64,1024], v: f32[64,16], at: s32[]) -> f32[64,1024] {
  %w = f32[64,1024]{1,0} parameter(0)
  %v = f32[64,16]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[64,16]{1,0} dynamic-slice(%w, %zero, %at), dynamic_slice_sizes={64,16}
  %sum = f32[64,16]{1,0} add(%part, %v)
  ROOT %found = f32[64,1024]{1,0} dynamic-update-slice(%w, %sum, %zero, %at)
}
"""


def test_of_an_array_that_is_sliced_outside_a_fusion_only_the_slice_counts():
    block = 4 * 64 * 16
    assert account.account(ALONE).bytes == (2 + 3 + 2) * block
