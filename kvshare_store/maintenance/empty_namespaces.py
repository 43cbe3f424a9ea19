"""Records of namespaces in which nothing is stored any more: who saves under ever new salts would
leave one for each of them."""

from __future__ import annotations

import time

from kvshare_store.commit.repository import Repository

_GRACE_S = 3600.0
"""A namespace that was emptied is likely to be used again."""


class EmptyNamespaces:
    """Of a catalogue of this home's own: other machines may be saving where this one sees nothing.
    One thread at a time."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._nodes = repository.nodes
        self._since: dict[str, float] = {}
        """When (monotonic) each was first seen to be empty."""

    def collect(self, *, patient: bool) -> int:
        """Remove the records of those that are empty, and (`patient`) have been so for an hour;
        returns how many."""
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
        """In the committer's thread: a node that is saved from now on gets a new record. While any
        row or block of no node is left, nothing goes: it may be sealed with a salt of these."""
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
