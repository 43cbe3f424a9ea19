"""Carries out purges that other machines have made: this machine removes its own copies."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from kvshare_store.bounded import pieces
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.ledger import Fact, within
from kvshare_store.commit.repository import Repository
from kvshare_store.quality.quality import Quality
from kvshare_store.save.saving import Saving

log = logging.getLogger("kvshare")

BEGUN = "begun "
"""Precedes the id of a purge while the catalogue may still have rows of the namespace."""
_CHUNK = 512
_KEPT = 8192
"""Purges that are kept for machines that are switched off. So many and not for so long: whoever
purged may have had a wrong clock, and so may whoever looks."""


class OthersPurges:
    """Purges are facts of a shared catalogue. Each machine removes its own copies when it looks at
    the facts next, even if it was not running at the time; the home remembers which purges were
    carried out.

    A purge is identified by its id and not by a time, because clocks differ.
    """

    def __init__(
        self, repository: Repository, saving: Saving, quality: Quality, home: Path
    ) -> None:
        self._repository = repository
        self._nodes = repository.nodes
        self._blocks = repository.blocks
        self._saving = saving
        self._quality = quality
        self._file = home / "purges.json"
        self._done = self._remembered()
        self._version = -1

    def _remembered(self) -> dict[str, str]:
        """The last purge carried out of each namespace. Homes of older releases have numbers: the
        times of purges without an id."""
        try:
            done = msgspec.json.decode(self._file.read_bytes(), type=dict[str, str | float])
        except (FileNotFoundError, msgspec.DecodeError):  # then they are carried out once more
            return {}
        return {digest: str(event) for digest, event in done.items()}

    def look(self) -> None:
        """Carry out new purges. Namespaces with leases or saves in progress are left for the next
        look."""
        catalog = self._repository.catalog
        if catalog is None or (version := catalog.facts.refresh()) == self._version:
            return
        waiting = False
        purges = _purges(catalog)
        for digest, fact in purges.items():
            event = fact.state or str(fact.at)
            if self._done.get(digest) == event:
                continue
            if fact.by == self._repository.machine or self._carried_out(catalog, digest, event):
                self._remember(digest, event, purges)
            else:
                waiting = True
        self._version = -1 if waiting else version

    def _remember(self, digest: str, event: str, known: Collection[str]) -> None:
        self._done = {at: done for at, done in self._done.items() if at in known}
        self._done[digest] = event
        written = self._file.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(self._done))
        written.replace(self._file)

    def _carried_out(self, catalog: Catalog, digest: str, event: str) -> bool:
        with self._nodes.lock:
            nodes = self._nodes.state.of_namespace(digest)
        here = {node.id: node.stamp for node in nodes}
        begun = event.startswith(BEGUN)
        remove = self._remove_copies
        return self._repository.queue.run(lambda: remove(catalog, digest, here, begun))

    def _remove_copies(
        self, catalog: Catalog, digest: str, here: Mapping[str, int], begun: bool
    ) -> bool:
        """Runs in the committer's thread, so the nodes `here` (stamps by id) are committed by now.
        Those that the catalogue lacks were purged; those that it has were saved again, unless the
        purge has only `begun`. In that case rows may still be there, and the result is False."""
        nodes = self._nodes
        catalog.refresh()
        if not begun:
            self._remove_without_record(catalog, digest)
            catalog.drop_unreadable(digest)
        nodes.learn_removals(_absent(catalog, here))
        digests = catalog.records.digests()
        with nodes.lock:
            nodes.namespaces.keep_recorded(digests)
            kept = nodes.state.of_namespace(digest)
            if (begun and kept) or self._saving.in_progress(digest):
                return False
            if not kept:
                nodes.state.remove_namespace(digest)
                catalog.records.forget_key(digest)
            keep = {name for node in kept for name in node.blocks}
            dropped = self._blocks.pool.drop_copies(digest, keep)
        self._saving.forget(digest)  # first: looks teach what is forgotten next
        self._quality.forget(digest)
        if not begun:
            catalog.forget_uses(digest, {node.id for node in kept})
        done = dropped is not None and not self._blocks.purge_copies(digest, dropped, keep)
        self._blocks.doubt_shared(None)
        self._blocks.pool.wipe()
        return done

    def _remove_without_record(self, catalog: Catalog, digest: str) -> None:
        """Remove rows that a machine committed before it had heard of the purge. The purge removed
        the record of their namespace, so nobody can read these rows, or name them to purge them
        again."""
        if digest in catalog.records.digests() or all(digest != at for _, at in catalog.ids()):
            return
        with self._nodes.lock:
            nodes = self._nodes.state.of_namespace(digest)
        names = sorted({name for node in nodes for name in node.blocks})
        for tier, error in self._blocks.purge(digest, names).items():
            # the janitor removes what no row names
            log.warning("kvshare: a purge left blocks in tier %s: %s", tier, error)
        catalog.purge(digest)


def _purges(catalog: Catalog) -> dict[str, Fact]:
    """The last purge of each namespace. Of very many those that seem oldest are dropped: a machine
    that was off all the time has forgotten the nodes, and removes their blocks as garbage."""
    facts = sorted(catalog.facts.facts("key LIKE 'purged/%'"), key=lambda fact: fact.at)
    dropped, kept = facts[:-_KEPT], facts[-_KEPT:]
    for some in pieces(dropped, _CHUNK):
        keys = within("key", [fact.key for fact in some])
        catalog.facts.remove(f"{keys} AND at <= {dropped[-1].at!r}")  # not one made since
    return {fact.key.rpartition("/")[2]: fact for fact in kept}


def _absent(catalog: Catalog, here: Mapping[str, int]) -> dict[str, int]:
    """The nodes whose rows are gone or have another stamp."""
    ids, rows = list(here), dict[str, int]()
    for some in pieces(ids, _CHUNK):
        rows |= catalog.stamps(ids=some)
    return {node_id: stamp for node_id, stamp in here.items() if rows.get(node_id) != stamp}
