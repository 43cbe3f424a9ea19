"""How far a run is, and how much it has found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvshare_store.cli.progress import progress


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """What to call with the number done and the number of findings."""
    with progress() as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, findings: shown.update(
            task, completed=done, description=f"{what} ({findings} findings)"
        )
