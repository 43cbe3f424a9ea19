"""Policies that sort names by a rank: LRU, and the cost-aware one."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import sqrt
from typing import NamedTuple

from sortedcontainers import SortedList

from kvshare_store.blocks.eviction.base import EvictionPolicy


class _Place(NamedTuple):
    """Where a name stands; names of one rank stand in the order of their last use."""

    rank: float
    turn: int
    name: str


class _Ranked(EvictionPolicy):
    """Names sorted by a rank, the lowest goes first.

    A plan uses dozens of names, and they are asked for in order only when something must go. So a
    use is noted, and names take their new places before anybody looks at the order.
    """

    def __init__(self) -> None:
        self._noted: dict[str, int] = {}
        """Uses that are not in the order yet, the latest last."""
        self._places: dict[str, _Place] = {}
        self._order: SortedList[_Place] = SortedList()
        self._turns = count()

    def _place(self, name: str, rank: float, turn: int | None = None) -> None:
        """`turn`: of the last use; None: now."""
        self._drop(name)
        turn = next(self._turns) if turn is None else turn
        place = self._places[name] = _Place(rank, turn, name)
        self._order.add(place)

    def _drop(self, name: str) -> _Place | None:
        place = self._places.pop(name, None)
        if place is not None:
            self._order.remove(place)
        return place

    def touch(self, name: str) -> None:
        self._noted[name] = self._noted.pop(name, 0) + 1

    def _settle(self) -> None:
        """Let names that were used take their new places."""
        while self._noted:
            noted, self._noted = self._noted, {}
            for name, uses in noted.items():
                self._use(name, uses)

    @abstractmethod
    def _use(self, name: str, uses: int) -> None:
        """The name was used so many times."""

    def victims(self) -> Iterator[str]:
        self._settle()
        now = next(self._turns)
        last: _Place | None = None
        offered: set[str] = set()
        while True:  # looked up anew each time: the order may have changed since
            self._settle()
            later = self._order.irange(last, None, (False, True))
            fit = (place for place in later if place.turn < now and place.name not in offered)
            last = next(fit, None)
            if last is None:
                return
            offered.add(last.name)
            yield last.name

    def __iter__(self) -> Iterator[str]:
        self._settle()
        return iter([place.name for place in self._order])

    def remove(self, name: str) -> None:
        self._settle()
        self._drop(name)

    def __len__(self) -> int:
        self._settle()
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        self._settle()
        return name in self._places


class LRU(_Ranked):
    """The least recently used name goes first."""

    def add(self, name: str, nbytes: int, cost: float = 1.0) -> None:
        if name not in self:
            self._place(name, 0.0)

    def _use(self, name: str, uses: int) -> None:
        """An unknown name is added."""
        self._place(name, 0.0)


@dataclass(slots=True)
class _Worth:
    nbytes: int
    cost: float
    since: float
    """The clock at the last use."""
    uses: int = 1


class CostAware(_Ranked):
    """Greedy-Dual-Size-Frequency with a memory: rank = clock + √uses * cost / bytes.

    The clock is the rank of the last name that was evicted, so whatever is no longer used sinks
    below what comes in, however often it was used once. A name counts from the clock at its last
    use: other bytes or another cost make it no younger. What comes back soon after it was evicted
    keeps its uses.
    """

    MOST_USES = 3
    """Each use says less about being used once more; from the third on, nothing."""
    MEMORY = 2
    """The evicted names that are remembered stand for this many times the bytes that were held."""

    def __init__(self) -> None:
        super().__init__()
        self._worths: dict[str, _Worth] = {}
        self._evicted: OrderedDict[str, _Worth] = OrderedDict()
        self._nbytes = self._most = self._evicted_bytes = 0
        self._clock = 0.0
        self._offered = ""

    def add(self, name: str, nbytes: int, cost: float = 1.0) -> None:
        self._settle()
        known = self._worths.get(name)
        turn = None
        if known is None:
            worth = _Worth(nbytes, cost, self._clock)
            if (before := self._evicted.pop(name, None)) is not None:
                self._evicted_bytes -= before.nbytes
                worth.uses = min(before.uses + 1, self.MOST_USES)
        elif (known.nbytes, known.cost) == (nbytes, cost):
            return
        else:
            worth = _Worth(nbytes, cost, known.since, known.uses)
            self._nbytes -= known.nbytes
            turn = self._places[name].turn
        self._worths[name] = worth
        self._nbytes += nbytes
        self._most = max(self._most, self._nbytes)
        self._rank(name, worth, turn)

    def _use(self, name: str, uses: int) -> None:
        worth = self._worths.get(name)
        if worth is not None:
            worth.since = self._clock
            worth.uses = min(worth.uses + uses, self.MOST_USES)
            self._rank(name, worth)

    def _rank(self, name: str, worth: _Worth, turn: int | None = None) -> None:
        rank = worth.since + sqrt(worth.uses) * worth.cost / max(1, worth.nbytes)
        self._place(name, rank, turn)

    def victims(self) -> Iterator[str]:
        for name in super().victims():
            self._offered = name
            yield name

    def remove(self, name: str) -> None:
        self._settle()
        place = self._drop(name)
        if place is None:
            return
        worth = self._worths.pop(name)
        self._nbytes -= worth.nbytes
        if name == self._offered:  # evicted; a name deleted for another reason says nothing
            self._clock = max(self._clock, place.rank)
            self._remember(name, worth)

    def _remember(self, name: str, worth: _Worth) -> None:
        self._evicted[name] = worth
        self._evicted_bytes += worth.nbytes
        while self._evicted_bytes > self.MEMORY * self._most:
            self._evicted_bytes -= self._evicted.popitem(last=False)[1].nbytes
