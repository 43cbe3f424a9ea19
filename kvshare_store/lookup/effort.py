"""How much work the alignments of one plan may do: a crafted prompt must not cost more than any."""

from __future__ import annotations

import time
from collections.abc import Callable

_CELLS = 1 << 26
"""Pairs of tokens that are compared for one plan: 20 to 30 ms of one core."""
_PIECE = 1 << 13
"""What each piece of work costs beside its cells, in cells: calls from Python take microseconds."""
_SECONDS = 0.04
"""Nothing is begun so long after the first alignment of a plan began,"""
_UNTIMED = 1 << 23
"""but so many cells are allowed whatever the clock says: a short prompt must not lose its plan
because its thread had to wait for a core."""
HASHED, CALL, MATCH = 32, 1 << 15, 1 << 11
"""Cells that hashing a token costs, aligning a piece of any size, and each equal run that is
found."""


class Effort:
    """Counts what is spent. Work that would be too much is not begun, and the plan is made of what
    was found before."""

    def __init__(
        self,
        cells: int = _CELLS,
        seconds: float = _SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.left = cells
        self.reserve = 0.0
        """The share of all that is kept for later work."""
        self._cells, self._seconds = cells, seconds
        self._clock = clock
        self._until = clock() + seconds

    def spend(self, cells: int) -> bool:
        """Whether a piece of work of so many cells may begin; then it counts as done."""
        cost = cells + _PIECE
        if cost > self.left - self.reserve * self._cells:
            return False
        timed = self._cells - self.left + cost > _UNTIMED
        if timed and self._clock() > self._until - self.reserve * self._seconds:
            return False
        self.left -= cost
        return True

    def count(self, cells: int) -> None:
        """What a piece of work has cost beside what was foreseen."""
        self.left -= cells
