"""How far a command is: a bar in a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID

_EVERY_S = 10.0

T = TypeVar("T")


class Lines(Progress):
    """Plain lines, for logs. They name every task that is not done."""

    def __init__(self, console: Console, *, disable: bool) -> None:
        super().__init__(console=console, auto_refresh=False, disable=disable)
        self._began = self._said = time.monotonic()

    def start(self) -> None:
        """Nothing is drawn live."""

    def stop(self) -> None:
        """Nothing was drawn live."""

    def update(self, task_id: TaskID, **changed: Any) -> None:
        """As of a bar: how much is done, and of what."""
        super().update(task_id, **changed)
        self.refresh()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """So much more is done."""
        super().advance(task_id, advance)
        self.refresh()

    def refresh(self) -> None:
        """Print the lines, if it is time."""
        now = time.monotonic()
        if self.disable or now - self._said < _EVERY_S:
            return
        self._said = now
        seconds = now - self._began
        for task in self.tasks:
            if not task.finished:
                of = "" if task.total is None else f" of {task.total:,.0f}"
                line = f"[{seconds:4.0f} s] {task.description}: {task.completed:,.0f}{of}"
                self.console.print(line, markup=False, highlight=False)


def progress(*, quiet: bool = False) -> Progress:
    """Where to report how far a command is: stderr, since stdout is for results."""
    err = Console(stderr=True)
    if err.is_terminal:
        return Progress(console=err, disable=quiet, transient=True)
    return Lines(err, disable=quiet)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """The same items; how many of them were taken is reported."""
    with progress() as shown:
        yield from shown.track(items, total, description=what)
