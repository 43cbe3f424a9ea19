"""How far a run is: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_EVERY_S = 10.0
"""Least time between two lines."""


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """What to call with the number done and the number of findings."""
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done, findings: progress.update(
            bar, completed=done, description=f"{what} ({findings} findings)"
        )


def _lines(console: Console, what: str, total: int) -> Callable[[int, int], None]:
    began = said = time.monotonic()

    def count(done: int, findings: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _EVERY_S or done == total:
            said = now
            console.print(
                f"[{now - began:4.0f} s] {done} of {total} {what}, {findings} findings",
                markup=False,
            )
            console.file.flush()

    return count
