"""The page of the documentation: each row for the layer and two others."""

import pathlib

import jax
from transformations.layers import LINEAR, NAIVE, PLAIN
from transformations.measure import NEWER, TOPICS, rows_of

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "transformations.md"
COLUMNS = LINEAR, NAIVE, PLAIN

OLDEST = "0.10.2"
ON_THE_OLDEST = {
    ("jet", PLAIN): "✗ UnexpectedTracerError",
    ("custom root", PLAIN): "✗ NotImplementedError",
    ("custom root in forward mode", PLAIN): "✗ NotImplementedError",
    ("grad of grad of vmap", PLAIN): "✗ 3 times the bytes",
}
"""The cells that differ from those on the newest JAX."""

HEAD = """\
---
title: Every transformation
description: Transformations, solvers and kinds of sharding, each a test against float64, \
for the layer, the naive formula and a plain custom_vjp.
hide:
  - toc
---

# Every transformation

Wherever `x @ w.T + b` works, the layer works, with the same values. Each cell is a test, under the oldest and
the newest JAX. ✓: the values are right, against float64, or the costs are at most the naive formula's. ✗: the
exception, or how much more it costs. The plain `custom_vjp` is the one of
[the guide](custom-derivative.md). Other tests run each row with some of: both modules, bfloat16,
float8 and int8 products. A second derivative through float8 or int8 products is refused.
"""  # noqa: E501


def in_words(row):
    return row.replace("_", " ")


def _line(*cells):
    return "| " + " | ".join(cells) + " |\n"


def _tables(cells, chosen):
    """A table for each topic with the rows that are ``chosen`` by their cells."""
    text = ""
    for topic, module in TOPICS.items():
        names = [row.__name__ for row in rows_of(module)]
        names = [name for name in names if chosen(cells[name])]
        if names:
            text += f"\n### {topic}\n\n"
            text += _line("", *COLUMNS) + _line("---", *("---" for _ in COLUMNS))
        for name in names:
            row = in_words(name)
            mark = [" ¹" * ((row, c) in ON_THE_OLDEST) for c in COLUMNS]
            cells_of_row = map(str.__add__, cells[name], mark)
            text += _line(row + " ²" * (name in NEWER), *cells_of_row)
    return text


def text(cells):
    """The page from the cells of each row under the newest JAX."""

    def fails(row):
        return any(cell.startswith("✗") for cell in row)

    older = "; ".join(f"{row}, {c}" for (row, _), c in ON_THE_OLDEST.items())
    return (
        f"{HEAD}\n## Where the plain rule fails\n{_tables(cells, fails)}"
        f"\n¹ On JAX {OLDEST}: {older}.\n"
        f"\n## Where all pass\n{_tables(cells, lambda row: not fails(row))}"
        "\n² Needs JAX 0.11.1.\n"
    )


def recorded():
    """What the page says of this JAX, by row and column."""
    lines = [
        [cell.strip(" ¹²") for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    newest = {
        (row, column): cell
        for row, *cells in lines
        for column, cell in zip(COLUMNS, cells, strict=True)
        if row and row != "---"
    }
    return newest | ON_THE_OLDEST if jax.__version__ == OLDEST else newest
