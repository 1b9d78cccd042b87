"""The benchmark of clipped gradients: its parts, and the committed figures."""

import json
import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("optax")

from benchmarks import examples
from benchmarks.aot.__main__ import compiled

OURS = ["plain", "norms", "one pass", "two passes"]
SMALL = {"batch": 16, "tokens": 8, "width": 64, "layers": 2}


def rows_of(program, contenders=OURS, **more):
    cell = examples.cell("cpu", program, contenders=contenders, sizes=SMALL, **more)
    rows, why = compiled(cell)
    assert why is None
    return {row["contender"]: row for row in rows}


def test_one_pass_has_the_products_of_the_plain_gradient_and_those_of_tokens():
    rows = rows_of("sequences")
    batch, tokens, width, layers = SMALL.values()
    of_layers = 2 * batch * tokens * width**2 * layers
    of_tokens = 2 * 2 * batch * tokens**2 * width * layers
    # Nothing differentiates the input of the first layer.
    assert rows["plain"]["flops"] == 3 * of_layers - of_layers // layers
    assert rows["one pass"]["flops"] == rows["plain"]["flops"] + of_tokens


@pytest.mark.parametrize("program", examples.MODELS)
def test_contenders_are_timed_in_turn_after_a_check(program):
    rows = rows_of(program, seconds=0.001)
    assert [*rows] == OURS
    assert rows["plain"]["to plain"] == 1
    assert rows["one pass"]["error"] < 1e-5


def test_committed_figures_are_what_the_page_claims():
    document = json.loads(examples.RESULTS.read_text())
    rows, times = document["rows"], document["times"]

    def temporaries(program, contender):
        fields = {"target": "cpu", "contender": contender}
        [row] = examples.chosen(rows, program, **fields)
        return row["temporary_bytes"]

    def ratio(program, contender, of):
        sizes = examples.MODELS[program]
        [row] = examples.chosen(times, program, contender=contender, sizes=sizes)
        return row[f"to {of}"]

    assert (
        temporaries("vectors", "one pass") < temporaries("vectors", "jax-privacy") / 100
    )
    assert ratio("vectors", "one pass", "jax-privacy") < 1 / 30
    assert ratio("vectors", "one pass", "plain") < 1.1
    for program in "sequences", "scanned", "small_gpt":
        assert ratio(program, "one pass", "plain") < 1.4
        assert math.isfinite(ratio(program, "one pass", "jax-privacy"))
