"""Garbage of a remote that several machines share: blocks that no row of the catalogue names.

Nobody knows what other machines are about to commit. So a block is condemned first, and removed a
grace period later by one machine, which reads the catalogue in between (docs/design/sharing.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvshare_store.bounded import pieces, pieces_with_pauses
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.ledger import Fact
from kvshare_store.commit.condemned import Condemned
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.errors import StorageError
from kvshare_store.errors.wording import short

_CHUNK = 512
_REMOVED_AT_ONCE = 1024
"""Blocks that are claimed in one pass."""
_DELETES = 16
"""Blocks deleted concurrently."""
_REST = 50
"""A listing is repeated after this many times the time that it took: it costs 2 % of one
machine."""
_TURN = "janitor"


class SharedGarbage:
    """One machine's part of the work. `turn_s`: how long the other machines leave it to the one
    that did it last."""

    def __init__(
        self, nodes: NodeStore, catalog: Catalog, condemned: Condemned, machine: str, turn_s: float
    ) -> None:
        self._nodes = nodes
        self._catalog = catalog
        self._condemned = condemned
        self._machine = machine
        self._turn_s = turn_s
        self._garbage: dict[str, float] = {}
        """When each block was first seen to be garbage."""
        self._listed_again = 0.0
        self._turn: Fact | None = None
        self._turn_seen = 0.0
        """When that turn, as it is written down, was first seen here."""

    def my_turn(self) -> bool:
        """Whether it is this machine's turn. If it does nothing, another takes over. A turn is
        renewed only when it is half over, because each renewal makes a version of the table."""
        now, facts = time.time(), self._catalog.facts
        turn = next(iter(facts.facts(f"key = '{_TURN}'")), None)
        if turn is None:
            return bool(facts.create([Fact(_TURN, now, self._machine)]))
        mine, watched = turn.by == self._machine, self._condemned.clock()
        if turn != self._turn:
            self._turn, self._turn_seen = turn, watched
        # a machine whose clock is ahead may write down a moment that is far away, and be gone
        age = max(now - turn.at, watched - self._turn_seen)
        if age < self._turn_s / (2 if mine else 1):
            return mine
        same = f"key = '{_TURN}' AND by = '{turn.by}' AND at = {turn.at!r}"
        return bool(facts.change(same, by=self._machine, at=now))

    def collect(self, *, patient: bool, stopped: Callable[[], bool]) -> int:
        """One pass; returns how many blocks were removed. A patient one skips a listing that was
        made lately.

        Nothing is removed without conditional commits: a machine could not know that it alone has
        claimed a block.
        """
        if not self._catalog.place.conditional:
            return 0
        if not patient or self._condemned.clock() >= self._listed_again:
            self._condemn()
        return self._remove(stopped)

    def _condemn(self) -> None:
        begun = self._condemned.clock()
        listed = self._nodes.blocks.list_shared()
        used = self.named_blocks() if listed else set()
        garbage = [name for name in listed if name not in used and not self._nodes.tree.uses(name)]
        self._garbage = {name: self._garbage.get(name, begun) for name in garbage}
        grace = self._condemned.grace_s
        due = [name for name, since in self._garbage.items() if begun - since >= grace]
        for chunk in pieces(due, _CHUNK):
            self._condemned.mark({name: listed[name] for name in chunk})
        self._listed_again = self._condemned.clock() + _REST * (self._condemned.clock() - begun)

    def _remove(self, stopped: Callable[[], bool]) -> int:
        claimed = self._condemned.claim(_REMOVED_AT_ONCE)
        if not claimed:
            return 0
        until = self._condemned.clock() + self._condemned.removal_seconds()
        named = self.named_blocks()  # after the claim: a row that is committed later finds it
        self._condemned.release({n: space for n, space in claimed.items() if n in named})
        unused = [name for name in claimed if name not in named]
        purged = {claimed[name] for name in unused} - self._catalog.records.digests()
        removed = 0
        for chunk in pieces(unused, _DELETES):
            if self._condemned.clock() >= until or stopped():
                break  # still claimed; the next pass goes on
            gone = {name: claimed[name] for name in chunk}
            self._nodes.blocks.delete_shared(gone)
            self._condemned.release(gone, purged)
            removed += len(gone)
        return removed

    def named_blocks(self) -> set[str]:
        """All blocks that rows name at this moment. `StorageError` if a row cannot be read: the
        blocks that it names must stay."""
        self._catalog.refresh()
        stamps = self._catalog.stamps()
        named: set[str] = set()
        elsewhere: list[str] = []
        for chunk in pieces_with_pauses(list(stamps), _CHUNK):
            with self._nodes.lock:
                for node_id in chunk:
                    node = self._nodes.tree.get(node_id)
                    if node is not None and node.stamp == stamps[node_id]:
                        named.update(node.blocks)
                    else:
                        elsewhere.append(node_id)
        if elsewhere:
            named |= self._read(elsewhere)
        return named

    def _read(self, ids: Sequence[str]) -> set[str]:
        """Blocks named by rows that this machine does not hold in the same form."""
        self._catalog.records.read()  # and the keys of those that are new
        named: set[str] = set()
        unread = set(ids)
        for chunk in pieces(ids, _CHUNK):
            for node, _ in self._catalog.load(ids=chunk):
                named.update(node.blocks)
                unread.discard(node.id)
        if unread and (left := self._catalog.stamps(ids=unread)):
            raise StorageError(
                f"{len(left)} rows of the catalogue cannot be read, {short(min(left))} for one: "
                "the remote is not collected until `kvshare check --repair` has removed them"
            )
        return named
