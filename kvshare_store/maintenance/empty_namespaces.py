"""Removes the records of namespaces in which nothing is stored any more. A client that saves under
ever new salts would otherwise leave a record for each of them."""

from __future__ import annotations

import time

from kvshare_store.commit.repository import Repository

_GRACE_S = 3600.0
"""A namespace that was emptied is likely to be used again."""


class EmptyNamespaces:
    """For a catalogue of this home's own. In a shared one, a namespace that looks empty here may be
    in use by other machines. One thread at a time."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._nodes = repository.nodes
        self._since: dict[str, float] = {}
        """When (monotonic) each was first seen to be empty."""

    def collect(self, *, patient: bool) -> int:
        """Remove the records of empty namespaces; returns how many. `patient`: only of those that
        have been empty for an hour."""
        repository, now = self._repository, time.monotonic()
        shared = repository.shared or any(level.shared for level in repository.blocks.levels)
        if repository.catalog is None or shared:
            return 0
        with self._nodes.lock:
            known = {each.digest for each in self._nodes.namespaces}
            empty = known - set(self._nodes.tree.namespaces())
        self._since = {digest: self._since.get(digest, now) for digest in empty}
        ripe = [d for d, since in self._since.items() if not patient or now - since > _GRACE_S]
        if not ripe:
            return 0
        return repository.queue.run(lambda: self._remove(ripe))

    def _remove(self, digests: list[str]) -> int:
        """Runs in the committer's thread, so a node that is saved from now on gets a new record.
        While garbage rows or blocks are left, no record is removed: they may be encrypted with its
        salt."""
        nodes, catalog = self._nodes, self._repository.catalog
        if catalog is None or not all(map(nodes.tree.uses, nodes.blocks.names())):
            return 0
        with_rows = {namespace for _, namespace in catalog.ids()}
        with nodes.lock:
            taken = with_rows | set(nodes.tree.namespaces()) | nodes.namespaces.closed
            gone = [digest for digest in digests if digest not in taken]
            for digest in gone:
                nodes.state.remove_namespace(digest)
        catalog.records.remove(gone)
        return len(gone)
