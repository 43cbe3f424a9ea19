"""Purging a namespace: no byte of it stays, in any tier, in LanceDB or in shared memory.

Blocks go before the rows that name them, so that a purge that was cut short can be made again;
docs/design/ordering.md says what a crash leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from kvshare_store.errors import KVShareError, NamespaceError
from kvshare_store.namespace import Namespace
from kvshare_store.saving import Saving
from kvshare_store.shelf import Shelf

_POLL_S = 0.05
_WIPED_AT_ONCE = 1 << 26
"""Bytes of the arena that are wiped while the lock is held."""


class Purged(msgspec.Struct, frozen=True):
    """What became of one namespace."""

    namespace: str
    model: str
    nodes: int
    blocks: int
    remaining: tuple[str, ...] = ()
    """What could not be removed, and why; empty: nothing is left."""


def matching(shelf: Shelf, beginning: str, tenant: str | None) -> list[Namespace]:
    """The namespace whose digest begins so, or all of a tenant; `NamespaceError` if there is none
    or the beginning fits several."""
    with shelf.lock:
        known = shelf.namespaces()
    if tenant is not None:
        found = [namespace for namespace in known if namespace.tenant == tenant]
        if not found:
            raise NamespaceError("no namespace is of that tenant")
        return found
    found = [namespace for namespace in known if namespace.digest.startswith(beginning)]
    if len(found) != 1 or not beginning:
        raise NamespaceError(f"{len(found)} namespaces begin with {beginning!r}; name exactly one")
    return found


class Purge:
    """One purge of one namespace. Do not hold the lock."""

    def __init__(
        self, shelf: Shelf, saving: Saving, namespace: Namespace, reap: Callable[[], None]
    ) -> None:
        self._shelf = shelf
        self._saving = saving
        self._namespace = namespace
        self._digest = namespace.digest
        self._reap = reap
        self._nodes: set[str] = set()
        self._names: set[str] = set()

    def preview(self) -> Purged:
        """What there is to purge."""
        with self._shelf.lock:
            nodes = [node for node in self._shelf.tree if node.namespace == self._digest]
        self._nodes = {node.id for node in nodes}
        self._names = {name for node in nodes for name in node.blocks}
        return self._result()

    def run(self, patience: float) -> Purged:
        """Take the namespace out of lookup now, wait for leases and saves for at most `patience`
        seconds, then remove everything. Nothing new is stored in the namespace meanwhile."""
        deadline = time.monotonic() + patience
        with self._shelf.lock:
            self._shelf.closed.add(self._digest)
        try:
            remaining = self._wait(deadline)
            return self._result(remaining or [*self._remove(), *self._wipe(deadline)])
        finally:
            with self._shelf.lock:
                self._shelf.closed.discard(self._digest)

    def _result(self, remaining: Sequence[str] = ()) -> Purged:
        nodes, blocks = len(self._nodes), len(self._names)
        return Purged(self._digest, self._namespace.model, nodes, blocks, tuple(remaining))

    def _wait(self, deadline: float) -> list[str]:
        """For whoever reads or writes rows of the namespace; says who is left."""
        while True:
            self._reap()
            for node in self._shelf.withdraw(self._digest):  # a save may have ended just now
                self._nodes.add(node.id)
                self._names.update(node.blocks)
            with self._shelf.lock:
                leased = sum(map(self._shelf.blocks.leases.pinned, self._names))
                saves = self._saving.in_progress(self._digest)
            remaining = [f"{leased:,} blocks are leased"] if leased else []
            remaining += [f"{saves:,} saves are in progress"] if saves else []
            if not remaining or time.monotonic() > deadline:
                return remaining
            time.sleep(_POLL_S)

    def _remove(self) -> list[str]:
        """Blocks, then rows, then what the namespace is. In the committer's thread, after all that
        was ordered before."""
        return self._shelf.committer.run(self._remove_now)

    def _remove_now(self) -> list[str]:
        shelf, digest = self._shelf, self._digest
        if shelf.catalog is not None:
            for node, _ in shelf.catalog.load(digest):  # also those of other machines
                self._nodes.add(node.id)
                self._names.update(node.blocks)
        refused = shelf.blocks.purge(digest, sorted(self._names))
        remaining = [f"tier {tier}: {error}" for tier, error in refused.items()]
        if remaining and not shelf.encrypted:
            return remaining  # the rows say what is left to be removed the next time
        try:
            if shelf.catalog is not None:
                shelf.catalog.purge(digest)
        except KVShareError as error:
            return [*remaining, f"catalogue: {error}"]
        shelf.forget_namespace(digest)
        return [f"{what} (unreadable: the key is destroyed)" for what in remaining]

    def _wipe(self, deadline: float) -> list[str]:
        """Zero what is free of the arena. Slots that are being filled may have held rows of the
        namespace: once they are filled or given back they hold none."""
        blocks = self._shelf.blocks
        at: int | None = 0
        with self._shelf.lock:
            filling = blocks.filling()
        while at is not None:
            with self._shelf.lock:
                at = blocks.host.wipe(at, _WIPED_AT_ONCE)
        while filling := filling & blocks.filling():
            if time.monotonic() > deadline:
                return [f"{len(filling):,} slots in shared memory are being filled"]
            self._reap()
            time.sleep(_POLL_S)
        return []
