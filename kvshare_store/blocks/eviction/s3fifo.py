"""S3-FIFO: three queues. Most of what is used only once leaves early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count

from sortedcontainers import SortedDict

from kvshare_store.blocks.eviction.base import EvictionPolicy


@dataclass(slots=True)
class _Queued:
    turn: int
    nbytes: int
    uses: int = 0


class _Queue:
    """First in, first out, in bytes."""

    def __init__(self) -> None:
        self.entries: dict[str, _Queued] = {}
        self.nbytes = 0
        self._turns: SortedDict[int, str] = SortedDict()

    def push(self, name: str, entry: _Queued) -> None:
        self.entries[name] = entry
        self._turns[entry.turn] = name
        self.nbytes += entry.nbytes

    def pop(self, name: str) -> _Queued:
        entry = self.entries.pop(name)
        del self._turns[entry.turn]
        self.nbytes -= entry.nbytes
        return entry

    def oldest(self) -> tuple[str, _Queued]:
        _, name = self._turns.peekitem(0)
        return name, self.entries[name]

    def walk(self, stop: int, fewest: int, most: int) -> Iterator[str]:
        """Names with so many uses that were added before turn `stop`, the oldest first."""
        last = -1
        while True:
            later = self._turns.irange(last, stop, (False, False))
            found = ((turn, self._turns[turn]) for turn in later)
            wanted = (f for f in found if fewest <= self.entries[f[1]].uses <= most)
            last, name = next(wanted, (stop, ""))
            if last == stop:
                return
            yield name


class S3FIFO(EvictionPolicy):
    """Three FIFO queues: `small` for new names, `main` for names that were used again, `ghost` for
    the names (without bytes) of what left `small`.

    After Yang et al., SOSP 2023; here queues are measured in bytes.
    """

    SMALL = 0.1
    """Share of the bytes that new names may take."""
    MOST_USES = 3

    def __init__(self) -> None:
        self._small = _Queue()
        self._main = _Queue()
        self._ghost: OrderedDict[str, int] = OrderedDict()
        self._ghost_bytes = 0
        self._most = 0
        """The most bytes so far: a policy is not told its budget."""
        self._turns = count()
        self._offered = ""

    def _queue_of(self, name: object) -> _Queue | None:
        return next((q for q in (self._small, self._main) if name in q.entries), None)

    def add(self, name: str, nbytes: int, cost: float = 1.0) -> None:
        queue = self._queue_of(name)
        if queue is not None:
            queue.nbytes += nbytes - queue.entries[name].nbytes
            queue.entries[name].nbytes = nbytes
            return
        seen = self._ghost.pop(name, None)
        self._ghost_bytes -= seen or 0
        queue = self._small if seen is None else self._main
        queue.push(name, _Queued(next(self._turns), nbytes))
        self._most = max(self._most, self._small.nbytes + self._main.nbytes)

    def touch(self, name: str) -> None:
        queue = self._queue_of(name)
        if queue is not None:
            entry = queue.entries[name]
            entry.uses = min(entry.uses + 1, self.MOST_USES)

    def remove(self, name: str) -> None:
        if name == self._offered:  # evicted; a name deleted for another reason says nothing
            self._give_chances(name)
        queue = self._queue_of(name)
        if queue is None:
            return
        entry = queue.pop(name)
        if queue is self._small:
            self._ghost[name] = entry.nbytes
            self._ghost_bytes += entry.nbytes
        while self._ghost_bytes > (1 - self.SMALL) * self._most:
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]

    def _give_chances(self, victim: str) -> None:
        """Names that stand before the victim and were used move on. This happens when the victim is
        removed, so that iterating over `victims` changes nothing."""
        queue, spared = (self._small, 2) if victim in self._small.entries else (self._main, 1)
        while victim in queue.entries:
            name, entry = queue.oldest()
            if entry.uses < spared:  # the victim, or one that its owner keeps
                return
            queue.pop(name)
            uses = 0 if queue is self._small else entry.uses - 1
            self._main.push(name, _Queued(next(self._turns), entry.nbytes, uses))

    def victims(self) -> Iterator[str]:
        for name in self:
            self._offered = name
            yield name

    def __iter__(self) -> Iterator[str]:
        stop = next(self._turns)
        new = self._small.walk(stop, 0, 1)
        old = chain.from_iterable(
            self._main.walk(stop, uses, uses) for uses in range(self.MOST_USES + 1)
        )
        kept = [0, 0]  # bytes of each queue that were offered and not taken
        while True:
            small, main = self._small.nbytes - kept[0], self._main.nbytes - kept[1]
            first, second = (new, old) if small >= self.SMALL * (small + main) else (old, new)
            name = next(first, None) or next(second, None)
            if name is None:
                break
            yield name
            if (queue := self._queue_of(name)) is not None:
                kept[queue is self._main] += queue.entries[name].nbytes
        yield from self._small.walk(stop, 2, self.MOST_USES)

    def __len__(self) -> int:
        return len(self._small.entries) + len(self._main.entries)

    def __contains__(self, name: object) -> bool:
        return self._queue_of(name) is not None
