"""What the backward pass keeps of a weight: the committed figures, and this CPU's."""

import json

import pytest

pytest.importorskip("matplotlib")

from benchmarks.aot import kept, plots, programs, timed
from benchmarks.aot.__main__ import compiled

SMALL = {"layers": 8, "width": 512, "rows": 128}
BEST = {"h100": ("unfenced", 0.72, 0.97), "v5e": ("fenced", 0.45, 0.85)}
BEST["cpu"] = "unfenced", 0.7, 1.0
"""The line of each target, and its largest share of the naive formula's memory."""


def rows_of(**cell):
    rows, why = compiled(kept.cell("cpu", **cell))
    assert why is None
    return {(row["contender"], row.get("line")): row for row in rows}


def check_shares(rows, line, temporaries, moved):
    ours, naive = rows["ours", line], rows["naive", None]
    assert ours["temporary_bytes"] <= temporaries * naive["temporary_bytes"]
    assert ours["bytes"] <= moved * naive["bytes"]
    assert ours["flops"] == naive["flops"]


@pytest.mark.parametrize("target", kept.TARGETS)
def test_committed_figures_have_the_shares_that_the_page_states(target):
    rows = json.loads(kept.RESULTS.read_text())["rows"]
    rows = kept.chosen(rows, "scanned", target=target, layout=None, sizes=kept.LAYERS)
    check_shares({(r["contender"], r.get("line")): r for r in rows}, *BEST[target])


def test_scanned_layers_in_a_checkpoint_keep_a_copy_less_on_this_cpu():
    rows = rows_of(program="scanned", sizes=SMALL)
    assert len(rows) == 9
    check_shares(rows, *BEST["cpu"])
    copies = SMALL["layers"] * SMALL["width"] ** 2 * 2
    for contender in kept.CONTENDERS:
        found = [rows[contender, line]["temporary_bytes"] for line in kept.LINES]
        assert max(found[1:]) <= found[0] - 0.8 * copies


def test_a_gpt_keeps_a_copy_less_and_none_where_its_blocks_are_recomputed():
    sizes = SMALL | {"width": 256}
    copies = SMALL["layers"] * 12 * sizes["width"] ** 2 * 2
    rows = rows_of(program="gpt", sizes=sizes, contenders=["ours"])
    without, line = (rows["ours", k]["temporary_bytes"] for k in (None, "unfenced"))
    assert line <= without - 0.9 * copies
    recomputed = rows_of(program="remat", sizes=sizes, contenders=["ours"])
    for row in recomputed.values():
        assert row["temporary_bytes"] <= line


@pytest.mark.parametrize("program", ["written", "gpt"])
def test_contenders_are_timed_in_turn_after_a_check(program):
    sizes = {"layers": 2, "width": 64, "rows": 16}
    lines = [None, "unfenced"]
    rows = rows_of(program=program, sizes=sizes, lines=lines, seconds=0.001)
    assert len(rows) == 6
    assert rows["naive", None]["to naive"] == rows["ours", None]["to ours"] == 1
    assert all(row["median_s"] > 0 for row in rows.values())


def test_a_wrong_layer_is_not_timed(monkeypatch):
    def wrong(parameters, x, dtype, out_sharding):
        return 1.2 * right(parameters, x, dtype, out_sharding)

    right = programs.CONTENDERS["ours"]
    monkeypatch.setitem(programs.CONTENDERS, "ours", wrong)
    sizes = {"layers": 2, "width": 64, "rows": 16}
    cell = kept.cell("cpu", "scanned", sizes=sizes, seconds=0.001)
    with pytest.raises(ArithmeticError, match="gradient of ours, None is wrong"):
        [*timed.rows(cell)]


def test_the_picture_has_every_depth_of_every_target():
    rows = json.loads(kept.RESULTS.read_text())["rows"]
    rows = kept.chosen(rows, "scanned", layout=None)
    panels = plots.against_layers(rows, kept.TARGETS).axes
    assert [panel.get_title() for panel in panels] == [*kept.TARGETS.values()]
    for panel in panels:
        assert [[*line.get_xdata()] for line in panel.lines] == [kept.DEPTHS] * 4
        top = max(max(line.get_ydata()) for line in panel.lines)
        assert panel.get_ylim()[0] == 0 < top < panel.get_ylim()[1]
