"""Purging a namespace: no byte of it stays, in any tier, in LanceDB or in shared memory.

Blocks go before the rows that name them, so that a purge that was cut short can be made again;
docs/design/ordering.md says what a crash leaves.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.ledger import Fact
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.repository import Repository
from kvshare_store.errors import KVShareError, NamespaceError
from kvshare_store.errors.wording import duration
from kvshare_store.lookup.outcomes import Outcomes
from kvshare_store.maintenance.others_purges import BEGUN
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import Node
from kvshare_store.save.saving import Saving

_POLL_S = 0.05


class Purged(msgspec.Struct, frozen=True):
    """The result of purging one namespace, or one lineage in it."""

    namespace: str
    model: str
    nodes: int
    blocks: int
    remaining: tuple[str, ...] = ()
    """What could not be removed, and why; empty if nothing is left."""
    unsure: int = 0
    """Of a lineage: how many of the nodes may be of it, though nobody knows any more."""
    ids: tuple[str, ...] = ()
    """Of a lineage: its nodes, the purged one first; 1,000 at most."""


def matching(
    nodes: NodeStore, beginning: str, tenant: str | None = None, pool: str = ""
) -> list[Namespace]:
    """The namespace whose digest begins with this text, or all of a tenant's or a pool's;
    `NamespaceError` if there is none, or if several digests begin with it."""
    with nodes.lock:
        known = list(nodes.namespaces)
    if pool or tenant is not None:
        found = [one for one in known if (one.pool == pool if pool else one.is_of(tenant))]
        if not found:
            raise NamespaceError(f"no namespace is of that {'pool' if pool else 'tenant'}")
        return found
    found = [namespace for namespace in known if namespace.digest.startswith(beginning)]
    if len(found) != 1 or not beginning:
        raise NamespaceError(f"{len(found)} namespaces begin with {beginning!r}; name exactly one")
    return found


class Purge:
    """One purge of one namespace. Do not hold the lock."""

    def __init__(
        self,
        repository: Repository,
        outcomes: Outcomes,
        saving: Saving,
        namespace: Namespace,
        given_up: Callable[[], bool],
    ) -> None:
        """`given_up`: whether the caller no longer waits."""
        self._repository = repository
        self._nodes = repository.nodes
        self._blocks = repository.blocks
        self._outcomes = outcomes
        self._saving = saving
        self._namespace = namespace
        self._digest = namespace.digest
        self._given_up = given_up
        self._ids: set[str] = set()
        self._names: set[str] = set()

    def preview(self) -> Purged:
        """What is to be purged."""
        with self._nodes.lock:
            nodes = self._nodes.state.of_namespace(self._digest)
        self._note(nodes)
        return self._result()

    def _note(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self._ids.add(node.id)
            self._names.update(node.blocks)

    def run(self, patience: float) -> Purged:
        """Take the namespace out of lookup now, wait for leases and saves for at most `patience`
        seconds, then remove everything. Nothing new is stored in the namespace meanwhile."""
        deadline = time.monotonic() + patience
        with self._nodes.lock:
            self._nodes.namespaces.close(self._digest)
        try:
            remaining = self._wait(deadline)
            self._saving.forget(self._digest)  # first: looks teach what is forgotten next
            self._outcomes.forget(self._digest)  # also those of requests that ended during the wait
            return self._result(remaining or [*self._remove(), *self._wipe(deadline)])
        finally:
            with self._nodes.lock:
                self._nodes.namespaces.closed.discard(self._digest)

    def _result(self, remaining: Sequence[str] = ()) -> Purged:
        nodes, blocks = len(self._ids), len(self._names)
        return Purged(self._digest, self._namespace.model, nodes, blocks, tuple(remaining))

    def _wait(self, deadline: float) -> list[str]:
        """Wait for readers and writers of the namespace's rows; returns who is left."""
        while True:
            self._outcomes.reap(set())
            with self._nodes.lock:
                here = self._nodes.state.of_namespace(self._digest)
                self._note(self._nodes.drop([node.id for node in here]).nodes)
                leased = sum(map(self._blocks.leases.pinned, self._names))
                saves = self._saving.in_progress(self._digest)
            remaining = [f"{leased:,} blocks are leased"] if leased else []
            remaining += [f"{saves:,} saves are in progress"] if saves else []
            if not remaining or self._over(deadline):
                return remaining
            time.sleep(_POLL_S)

    def _over(self, deadline: float) -> bool:
        return time.monotonic() > deadline or self._given_up()

    def _remove(self) -> list[str]:
        """Remove the blocks, then the rows, then the namespace's record. Runs in the committer's
        thread, after all work that was queued before."""
        return self._repository.queue.run(self._remove_now)

    def _remove_now(self) -> list[str]:
        catalog, digest = self._repository.catalog, self._digest
        if catalog is not None:
            self._note(node for node, _ in catalog.load(digest))  # also those of other machines
        refused = self._blocks.purge(digest, sorted(self._names))
        remaining = [f"tier {tier}: {error}" for tier, error in refused.items()]
        if remaining and not self._repository.encrypted:
            return remaining  # the rows tell the next purge what is left
        ahead = 0.0
        try:
            if catalog is not None:
                event = uuid.uuid4().hex
                self._write_down(catalog, BEGUN + event)
                ahead = catalog.purge(digest)
                self._write_down(catalog, event)
        except KVShareError as error:
            return [*remaining, f"catalogue: {error}"]
        self._nodes.state.remove_namespace(digest)
        unreadable = [f"{what} (unreadable: the key is destroyed)" for what in remaining]
        return [*unreadable, *_old_versions(ahead)]

    def _write_down(self, catalog: Catalog, event: str) -> None:
        """Called before rows are removed, since a crash in between would leave other machines'
        copies, and again afterwards, because from then on rows of the namespace are new ones."""
        if self._repository.shared:
            key, now = f"purged/{self._digest}", time.time()
            catalog.facts.overwrite(Fact(key, now, self._repository.machine, event))

    def _wipe(self, deadline: float) -> list[str]:
        """Fill the free parts of the arena with zeros.

        Slots that are being filled may have held rows of the namespace. Once they are filled or
        given back they no longer do.
        """
        pool = self._blocks.pool
        with self._nodes.lock:
            filling = pool.filling()
        pool.wipe()
        while filling := filling & pool.filling():
            if self._over(deadline):
                return [f"{len(filling):,} slots in shared memory are being filled"]
            self._outcomes.reap(set())
            time.sleep(_POLL_S)
        return []


def _old_versions(ahead: float) -> list[str]:
    """What is said of old versions that LanceDB keeps while clocks differ."""
    if not ahead:
        return []
    return [
        f"catalogue: its old versions stay for {duration(ahead)} and an hour more, because the "
        "clock of another machine is ahead of this one's"
    ]
