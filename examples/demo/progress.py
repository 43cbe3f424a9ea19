"""Progress of the demo: a bar in a terminal, plain lines in a log."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_EVERY_S = 10.0
"""Least time between two lines of progress."""
_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


def progress_of(console: Console) -> "Bar | Lines":
    """A bar for a terminal, lines for anything else."""
    return Bar(console) if console.is_terminal else Lines(console)


class Bar:
    """A progress bar: the current step, how much is done, and the time so far."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(*_COLUMNS, console=console)
        self._task = self._progress.add_task("", total=None)

    def says(self, what: str, total: int | None = -1) -> None:
        """Name the current step; `total` sets the number of steps from here on."""
        if total != -1:
            self._progress.update(self._task, total=total)
        self._progress.update(self._task, description=what)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Lines:
    """A line when a step begins, and one every ten seconds with the progress."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._said = time.monotonic()
        self._what = ""
        self._done = 0
        self._total: int | None = None

    def says(self, what: str, total: int | None = -1) -> None:
        """Name the current step; `total` sets the number of steps from here on."""
        if total != -1:
            self._total = total
        self._what = what
        self._print(f"{what} ...")

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._done == self._total or time.monotonic() - self._said >= _EVERY_S:
            self._print(f"{self._what}: {self._done} of {self._total}")

    def _print(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(f"[{self._said - self._began:4.0f} s] {text}", markup=False)
        self._console.file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return
