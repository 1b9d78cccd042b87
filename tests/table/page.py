"""The table as a page, one for each version of JAX."""

import pathlib

import flax
import jax
from table.layers import LAYERS
from table.measure import TOPICS, rows_of

PAGES = pathlib.Path(__file__).parents[2] / "docs" / "transformations"
PAGE = PAGES / f"jax-{jax.__version__}.md"

HEAD = """\
---
title: Every transformation, JAX {jax}
description: Transformations, solvers and kinds of sharding, each a test against float64, \
for nine ways to write the layer.
hide:
  - toc
---

# Every transformation, JAX {jax}, Flax {flax}

Wherever `x @ w.T + b` works, the layer works, with the same values. Each cell is a test. ✓: the values
are right, against float64, or the costs no more than the naive formula's; ✗: what was raised, or by how
much. Refused: a second derivative through what is kept in 8 bits. The plain `custom_vjp` is that of
[the guide](../custom-derivative.md). `cd tests && python -m table` writes the page.
"""  # noqa: E501


def in_words(row):
    return row.replace("_", " ")


def _line(*cells):
    return "| " + " | ".join(cells) + " |\n"


def text(cells):
    """The page, of the cells of each row in the order of ``LAYERS``."""
    page = HEAD.format(jax=jax.__version__, flax=flax.__version__)
    for topic, module in TOPICS.items():
        page += f"\n## {topic}\n\n"
        page += _line("", *LAYERS) + _line("---", *("---" for _ in LAYERS))
        for row in rows_of(module):
            page += _line(in_words(row.__name__), *cells[row.__name__])
    return page


def recorded():
    """The cells of the page for this JAX, by row and column."""
    assert PAGE.exists(), f"no {PAGE.name}: `cd tests && python -m table` writes it"
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    return {
        (row, column): cell
        for row, *cells in lines
        for column, cell in zip(LAYERS, cells, strict=True)
        if row and row != "---"
    }
