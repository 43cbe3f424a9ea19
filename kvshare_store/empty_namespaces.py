"""Records of namespaces in which nothing is stored any more: who saves under ever new salts would
leave one for each of them."""

from __future__ import annotations

import time

from kvshare_store.shelf import Shelf

_GRACE_S = 3600.0
"""A namespace that was emptied is likely to be used again."""


class EmptyNamespaces:
    """Of a catalogue of this home's own: other machines may be saving where this one sees nothing.
    One thread at a time."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._since: dict[str, float] = {}
        """When (monotonic) each was first seen to be empty."""

    def collect(self, *, patient: bool) -> int:
        """Remove the records of those that are empty, and (`patient`) have been so for an hour;
        returns how many."""
        shelf, now = self._shelf, time.monotonic()
        shared = shelf.shared or any(level.shared for level in shelf.blocks.levels)
        if shelf.catalog is None or shared:
            return 0
        with shelf.lock:
            empty = {each.digest for each in shelf.namespaces()} - set(shelf.tree.namespaces())
        self._since = {digest: self._since.get(digest, now) for digest in empty}
        ripe = [d for d, since in self._since.items() if not patient or now - since > _GRACE_S]
        if not ripe:
            return 0
        return shelf.committer.run(lambda: self._remove(ripe))

    def _remove(self, digests: list[str]) -> int:
        """In the committer's thread: a node that is saved from now on gets a new record. While any
        row or block of no node is left, nothing goes: it may be sealed with a salt of these."""
        shelf = self._shelf
        if shelf.catalog is None or not all(map(shelf.tree.uses, shelf.blocks.names())):
            return 0
        with_rows = {namespace for _, namespace in shelf.catalog.ids()}
        with shelf.lock:
            taken = with_rows | set(shelf.tree.namespaces()) | shelf.closed
            gone = [digest for digest in digests if digest not in taken]
            for digest in gone:
                shelf.forget_namespace(digest)
        shelf.catalog.remove_namespaces(gone)
        return len(gone)
