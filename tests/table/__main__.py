"""Write the table for the installed JAX: ``cd tests && python -m table``."""

import conftest  # noqa: F401  Eight devices and every strictness, before JAX starts.
from rich.progress import track
from table.layers import LAYERS
from table.measure import ROWS, outcome
from table.page import PAGE, text

cells = {
    row: [outcome(function, name, layer) for name, layer in LAYERS.items()]
    for row, function in track(ROWS.items())
}
PAGE.write_text(text(cells))
