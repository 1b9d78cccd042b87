"""The table as a page, one for each version of JAX."""

import pathlib

import flax
import jax
from table.layers import LAYERS
from table.measure import TOPICS, rows_of

PAGE = pathlib.Path(__file__).with_name(f"jax-{jax.__version__}.md")


def in_words(row):
    return row.replace("_", " ")


def _line(*cells):
    return "| " + " | ".join(cells) + " |\n"


def text(cells):
    """The page, of the cells of each row in the order of ``LAYERS``."""
    page = f"# JAX {jax.__version__}, Flax {flax.__version__}\n\n"
    page += (
        "Written by `cd tests && python -m table`. ✓: the values are right, or costs"
        " no more than\nthe naive formula's; ✗: what was raised, or by how much."
        " Refused: a second derivative through\nwhat is kept in 8 bits.\n"
    )
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
