"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

_EVERY_S = 0.02


def eventually(happens: Callable[[], object], seconds: float) -> bool:
    """Whether the condition comes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            return False
        time.sleep(_EVERY_S)
    return True


def until(
    happens: Callable[[], object], seconds: float, what: str = "it did not come about"
) -> float:
    """Wait for a condition; returns the seconds it took. Fails with `what` if it does not come true
    within `seconds`."""
    begun = time.monotonic()
    assert eventually(happens, seconds), what
    return time.monotonic() - begun
