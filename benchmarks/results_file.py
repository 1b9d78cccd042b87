"""The results file: written after each measurement, and read to go on with it."""

import json
import os

from benchmarks.rows import rows_of

MUST_AGREE = "device", "cpu", "versions", "products", "seconds"
"""What a run must have in common with the file that it goes on with."""


def read(path):
    """The document in a results file; ValueError, in one line, if it is none."""
    try:
        document = json.loads(path.read_text())
        rows_of(document)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # Neither JSON nor text.
        raise ValueError(f"{path}: no JSON ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no results of benchmarks ({error!r})") from None
    return document


def write(document, path):
    """Replace the file at once: whoever stops the run leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def started(path, now, resume):
    """The document to fill: ``now``, or with ``resume`` the one in the file.

    ValueError if the file is no results file, which would be lost, or one with which
    this run cannot go on.
    """
    old = read(path) if path.exists() else None
    if old is None or not resume:
        return now | {"complete": False, "results": []}
    different = [name for name in MUST_AGREE if old.get(name) != now[name]]
    if different:
        raise ValueError(
            f"{path}: cannot go on with it, of another {' and '.join(different)}"
        )
    return old | {"complete": False}
