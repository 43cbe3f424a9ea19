"""Dictionaries that forget, and lists piece by piece."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

_PAUSE_S = 1e-4


class Latest(OrderedDict[K, V]):
    """At most `most` entries: one more pushes out the one that was set longest ago. An entry that
    is set again counts as new, as it does after `move_to_end`. Not thread-safe."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)


def pieces(items: Sequence[V], most: int) -> Iterator[Sequence[V]]:
    """The items in order, at most so many at a time."""
    for start in range(0, len(items), most):
        yield items[start : start + most]


def pieces_with_pauses(items: Sequence[V], most: int) -> Iterator[Sequence[V]]:
    """As `pieces`, with a pause after each in which other threads run: one that waits for a thread
    that merely computes waits 5 ms each time, Python's switch interval."""
    for piece in pieces(items, most):
        yield piece
        time.sleep(_PAUSE_S)
