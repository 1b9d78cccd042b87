"""Write the page, under the newest JAX: ``cd tests && python -m transformations``."""

import conftest  # noqa: F401  Eight devices and every strictness, before JAX starts.
from rich.progress import track
from transformations.layers import LAYERS
from transformations.measure import ROWS, outcome
from transformations.page import COLUMNS, PAGE, text

cells = {
    row: [outcome(function, name, LAYERS[name]) for name in COLUMNS]
    for row, function in track(ROWS.items())
}
PAGE.write_text(text(cells))
