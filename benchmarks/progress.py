"""How far it is: a bar on a terminal, and a line for each cell on anything else."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Cells:
    """Counts the cells that are done, with an estimate of the time that is left.

    ``weights`` are guesses of what each cell takes, in any unit.
    """

    def __init__(self, console, weights):
        self._console, self._weights = console, weights
        self._done, self._start = 0, time.monotonic()
        # Redirecting would keep lines for a pipe until the end.
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=len(weights))

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def begin(self, name):
        self._bar.update(self._task, description=name + self._left(", "))

    def finish(self, name):
        self._done += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            count = f"{self._done} of {len(self._weights)}"
            print(f"{count}{self._left(', ')}: {name}", flush=True)

    def _left(self, separator):
        done, rest = self._weights[: self._done], self._weights[self._done :]
        if not done:
            return ""
        spent = time.monotonic() - self._start
        return separator + in_words(spent * sum(rest) / sum(done)) + " left"


def in_words(seconds):
    if seconds < 90:
        return f"about {seconds:.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} h"
