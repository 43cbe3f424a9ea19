"""Blocks of a shared remote that are about to be removed, and how saves and removals agree on them.

Each is a fact of the shared catalogue: first `marked`, then `removing`. A machine that commits a
node removes the marks from its blocks, and waits for blocks that are being removed. A janitor
removes a block only if its mark is older than the grace period and no row names the block.
docs/design/sharing.md has the proof.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.catalog.ledger import MARKED, Fact, Ledger, within
from kvshare_store.errors import ClaimedBlockError
from kvshare_store.errors.wording import short

_PATIENCE_S = 5.0
"""How long a save waits for the removal of one of its blocks."""
_POLL_S = 0.02
_REMOVAL_S = 5.0
"""A janitor deletes blocks only within this time after its claim (or within half a grace period);
after that it claims them again."""
_REMOVING = "removing"


def now_s() -> float:
    """A clock that also runs while the machine sleeps, as those of the other machines do."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)


class _Seen(NamedTuple):
    """A condemned block, and when this machine first saw it in its present state."""

    fact: Fact
    since: float


class Condemned:
    """What this machine knows of them. Thread-safe."""

    def __init__(self, ledger: Ledger, machine: str, grace_s: float, blocks: BlockStore) -> None:
        self.grace_s = grace_s
        self._ledger = ledger
        self._machine = machine
        self._blocks = blocks
        self.clock: Callable[[], float] = now_s
        """This machine's own seconds: they measure durations only."""
        self._lock = threading.Lock()
        self._version = -1
        self._looked = self.clock()
        self._seen: dict[str, _Seen] = {}
        self._purges: dict[str, str] = {}
        """Namespaces that were purged, and how far the last purge of each has come."""

    def look(self) -> set[str]:
        """Names of the blocks that are condemned now. Marks last for a grace period, so whoever
        looks at least twice in that time sees each of them. After a longer pause nothing is
        certain, and neither is it after a purge, which condemns no block before it removes it."""
        with self._lock:
            asked = self.clock()
            version = self._ledger.refresh()
            if asked - self._looked > self.grace_s / 2:
                self._blocks.doubt_shared(None)
            self._looked = asked
            if version != self._version:
                found = self._ledger.facts("key LIKE 'block/%' OR key LIKE 'purged/%'")
                facts = [fact for fact in found if fact.key.startswith("block/")]
                purges = {at.key: at.state for at in found if at.key.startswith("purged/")}
                if purges != self._purges:
                    self._blocks.doubt_shared(None)
                self._purges = purges
                self._blocks.doubt_shared(
                    [name for fact in facts if (name := _name(fact)) not in self._seen]
                )
                self._seen = {_name(fact): self._since(fact, asked) for fact in facts}
                self._version = version
            return set(self._seen)

    def _since(self, fact: Fact, now: float) -> _Seen:
        before = self._seen.get(_name(fact))
        return before if before is not None and before.fact == fact else _Seen(fact, now)

    # --- whoever saves -----------------------------------------------------------------------

    def rescue(self, names: Collection[str]) -> None:
        """Return once none of the blocks is condemned. `StorageError` if one is being removed and
        that does not end: the prompt can be saved again later."""
        wanted, deadline = set(names), self.clock() + _PATIENCE_S
        while hit := self.look() & wanted:
            self._ledger.remove(f"state = '{MARKED}' AND {self._keys(hit)}")
            if not (hit := self.look() & wanted):
                return
            if self.clock() > deadline:
                raise ClaimedBlockError(
                    f"another machine is removing block {short(min(hit))}; save the prompt again"
                )
            time.sleep(_POLL_S)

    def _keys(self, names: Collection[str]) -> str:
        return within("key", [seen.fact.key for n in names if (seen := self._seen.get(n))])

    # --- a janitor ---------------------------------------------------------------------------

    def mark(self, blocks: Mapping[str, str]) -> None:
        """Condemn blocks that no row of the catalogue names: their namespaces, by name."""
        now = time.time()
        facts = [
            Fact(f"block/{namespace}/{name}", now, self._machine, MARKED)
            for name, namespace in blocks.items()
        ]
        self._ledger.create(facts)

    def claim(self, limit: int) -> dict[str, str]:
        """Claim blocks for removal by this machine alone; their namespaces, by name.

        The caller then reads the catalogue and releases those that a row names. A mark must be
        older than the grace period. A claim of another machine that has led to nothing for two
        grace periods is taken over: that machine has died or has given up.
        """
        self.look()
        now = self.clock()
        due = [name for name, seen in self._seen.items() if self._due(seen, now)][:limit]
        if not due:
            return {}
        keys = self._keys(due)
        # not one that was saved and condemned again since it was seen
        seen = ", ".join(repr(self._seen[name].fact.at) for name in due)
        self._ledger.change(
            f"{keys} AND at IN ({seen})", state=_REMOVING, by=self._machine, at=time.time()
        )
        ours = f"{keys} AND state = '{_REMOVING}' AND by = '{self._machine}'"
        return {_name(fact): fact.key.split("/")[1] for fact in self._ledger.facts(ours)}

    def _due(self, seen: _Seen, now: float) -> bool:
        if seen.fact.state == MARKED:
            return now - seen.since >= self.grace_s
        mine = seen.fact.by == self._machine
        return mine or now - seen.since > 2 * max(self.grace_s, _REMOVAL_S)

    def removal_seconds(self) -> float:
        """How long after a claim its blocks may be deleted."""
        return max(self.grace_s / 2, _REMOVAL_S)

    def release(self, blocks: Mapping[str, str], purged: Collection[str] = ()) -> None:
        """The blocks are removed, or they stay: from now on saves may rely on what they see. Names
        of namespaces that were `purged` meanwhile are deleted from old versions of the facts as
        well."""
        keys = {f"block/{namespace}/{name}": namespace for name, namespace in blocks.items()}
        gone = [key for key, namespace in keys.items() if namespace in purged]
        kept = [key for key, namespace in keys.items() if namespace not in purged]
        for some, remove in ((kept, self._ledger.remove), (gone, self._ledger.erase)):
            if some:
                remove(f"{within('key', some)} AND by = '{self._machine}'")


def _name(fact: Fact) -> str:
    return fact.key.rpartition("/")[2]
