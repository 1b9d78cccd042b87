"""The page of findings, from the headers of the scripts in ``findings``.

A header begins with libraries and their versions, up to the first colon; what follows
is what was found, up to the line that begins with ``Output:``.
"""

import itertools
import pathlib

from benchmarks.machine import ROOT

LIBRARIES = {"JAX": "JAX and XLA", "libtpu": "JAX and XLA"}
"""The headings of libraries whose names they do not have."""


def tables():
    """The generated part of the page, by name."""
    found = sorted(map(read, (ROOT / "findings").glob("*.sh")))
    groups = itertools.groupby(found, key=lambda one: one[0])
    parts = [[f"## {name}", *(text for *_, text in some)] for name, some in groups]
    return {"findings": "\n\n".join(itertools.chain(*parts))}


def read(path: pathlib.Path):
    """The library of a finding, the name of its script, and its text."""
    lines = itertools.takewhile(
        lambda line: line.startswith("#"), path.read_text().splitlines()[1:]
    )
    header = " ".join(line.removeprefix("#").strip() for line in lines)
    header, _, _ = header.partition(" Output: ")
    where, _, what = header.partition(": ")
    library = where.split()[0]
    text = f"**{where}.** {what[0].upper()}{what[1:]} (`findings/{path.name}`)"
    return LIBRARIES.get(library, library), path.name, text
