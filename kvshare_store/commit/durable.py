"""Bytes before metadata, in the committer's thread: namespaces, room, blocks, then rows.

Rows are removed before their blocks; docs/design/ordering.md says what a crash after each step
leaves behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.faults import report
from kvshare_store.commit.condemned import Condemned
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.queue import Addition, Removal
from kvshare_store.commit.room import Room
from kvshare_store.errors import FullDiskError, KVShareError, MissingBlockError, StorageError
from kvshare_store.errors.wording import short
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import Vectors
from kvshare_store.observability.logs import Seldom
from kvshare_store.observability.metrics import Metrics

log = logging.getLogger("kvshare")

T = TypeVar("T")

Ended = list[KVShareError | None]
"""For each node, what went wrong, or None."""

_COMMIT_BYTES = 1 << 16
"""Roughly the bytes that LanceDB writes for one commit, besides the rows."""
_CONFIRMED_IN = 4
"""Attempts to write blocks within half a grace period."""


class Durable:
    """Makes nodes durable, and removes them. The caller deals with nodes that cannot be made
    durable."""

    def __init__(
        self,
        nodes: NodeStore,
        catalog: Catalog | None,
        condemned: Condemned | None,
        metrics: Metrics,
    ) -> None:
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._catalog = catalog
        self._condemned = condemned
        self._metrics = metrics
        self.room = Room(nodes, catalog)
        self._say = Seldom(log)
        self._refused: list[Removal] = []
        """Removals whose rows the catalogue has refused to remove."""

    # --- nodes come --------------------------------------------------------------------------

    def store(self, additions: Sequence[Addition]) -> Ended:
        """Store blocks, then rows, in batches of the size that the tiers can use."""
        self.remove(())
        nodes = [addition.node for addition in additions]
        ended = self._make(nodes)
        durable = [at for at, error in enumerate(ended) if error is None]
        if self._catalog is None or not durable:
            return ended
        self.room.keep = {nodes[at].id for at in durable}
        try:
            known = self.add([additions[at] for at in durable])
            self._replaced({nodes[at].id for at in durable})
            confirmed = self._confirmed([nodes[at] for at in durable], known)
        except KVShareError as error:
            confirmed = [error] * len(durable)
        for at, outcome in zip(durable, confirmed, strict=True):
            ended[at] = outcome
        return ended

    def _make(self, nodes: Sequence[Node]) -> Ended:
        try:
            self._record_namespaces(nodes)
        except KVShareError as error:
            return [error] * len(nodes)
        ended = zip(nodes, _each(self.write, nodes), strict=True)
        return [error or self._refused_row(node) for node, error in ended]

    def _refused_row(self, node: Node) -> KVShareError | None:
        """Why the row of a node whose blocks are durable is not committed.

        Where nodes are written one by one, room for one may be made by removing another, which may
        have been saved again since, with other blocks. And in a shared catalogue the first row of a
        node stays: where that is still to be removed, the node would go with it.
        """
        if not self._nodes.has(node):
            return MissingBlockError(f"node {short(node.id)} left before its row was committed")
        if self._condemned is not None and any(node.id in each.nodes for each in self._refused):
            return StorageError(f"the old row of node {short(node.id)} could not be removed")
        return None

    def _record_namespaces(self, nodes: Sequence[Node]) -> None:
        known = self._nodes.namespaces
        # the namespace of a node that was removed may be forgotten already
        new = known.unrecorded(node.namespace for node in nodes)
        if new and self._catalog is not None:
            self._catalog.records.add(new)
        known.recorded(new)

    def write(self, nodes: Sequence[Node]) -> None:
        """Return once every block of the nodes is durable; raises the first error."""
        with self._nodes.lock:
            for node in nodes:
                if node.id not in self._nodes.tree:
                    raise MissingBlockError(f"node {short(node.id)} left before it was durable")
        names = _blocks_of(nodes)
        room = self.room
        room.keep = {node.id for node in nodes}
        room.make(names)
        if self._condemned is not None:
            self._condemned.rescue(names)
        room.retried(lambda: self._blocks.persist(names), room.missing_bytes(names))

    def add(self, rows: Sequence[tuple[Node, Vectors]], *, new: bool = True) -> set[str]:
        """Commit rows of nodes whose blocks are durable. Returns the ids of nodes whose rows
        another machine committed first; those rows stay. Without `new`, nothing is forgotten to
        make room for them."""
        catalog = self._catalog
        if catalog is None:
            return set()
        return self._with_room(lambda: catalog.add(rows), forgetting=new)

    def replace(self, node: Node, vectors: Vectors, expected: int) -> bool:
        """Replace a node's row, but only if it has the stamp `expected`; False if it has not.
        Nothing is forgotten to make room for it."""
        catalog = self._catalog
        if catalog is None:
            return True
        return self._with_room(lambda: catalog.replace(node, vectors, expected), forgetting=False)

    def _with_room(self, commit: Callable[[], T], *, forgetting: bool) -> T:
        self.room.fit_catalog()
        if forgetting:
            return self.room.retried(commit, _COMMIT_BYTES)
        return self.room.compacted(commit)

    def _confirmed(self, nodes: Sequence[Node], known: Collection[str]) -> Ended:
        """Rows were committed. For the nodes in `known`, another machine's row was there before."""
        if self._condemned is None or self._catalog is None:
            return [None] * len(nodes)
        ours = [node for node in nodes if node.id not in known]
        ended = dict(zip((node.id for node in ours), _each(self.confirm, ours), strict=True))
        try:
            theirs = list(self._catalog.load(ids=known)) if known else []
            self._nodes.learn((), theirs, {node.id: node.stamp for node in nodes})
            report(self._catalog.take_faults(), self._metrics)
        except KVShareError as error:
            ended |= dict.fromkeys(known, error)
        return [ended.get(node.id) for node in nodes]

    def confirm(self, nodes: Sequence[Node]) -> None:
        """The rows of these nodes were committed. Return once no machine can have removed one of
        their blocks from a shared remote without having seen the row. Raises if that cannot be
        assured."""
        if self._condemned is None or not nodes:
            return
        names = _blocks_of(nodes)
        for _ in range(_CONFIRMED_IN):
            self._condemned.rescue(names)
            if self._blocks.sure(names):
                return
            self._blocks.persist(names)
        raise StorageError(
            "the catalogue is slower than shared_grace_seconds allows; raise that on every machine"
        )

    # --- nodes go ----------------------------------------------------------------------------

    def remove(self, removals: Sequence[Removal]) -> KVShareError | None:
        """Remove rows, then blocks. Returns why rows could not be removed: they and their blocks
        stay, and are removed with the next ones. Until then a restart brings these nodes back.

        Where the disk is full blocks go first, to make room: the next start drops rows without
        blocks.
        """
        removals, self._refused = [*self._refused, *removals], []
        if not removals:
            return None
        try:
            try:
                self._remove_rows(removals)
            except FullDiskError:
                self._remove_blocks(removals)
                self._remove_rows(removals)
        except KVShareError as error:
            self._refused = [removal for removal in removals if removal.nodes]
            self._remove_blocks([removal for removal in removals if not removal.nodes])
            self._metrics.error(error.kind)
            self._say.warn("remove", f"rows could not be removed, it is tried again: {error}")
            return error
        self._remove_blocks(removals)
        return None

    def _remove_blocks(self, removals: Sequence[Removal]) -> None:
        """What storage refuses to remove stays as garbage."""
        self._nodes.removed(removals)
        try:
            self.room.delete(dict.fromkeys(block for each in removals for block in each.blocks))
        except KVShareError as error:
            log.warning("kvshare: removal left garbage behind: %s", error)

    def _replaced(self, ids: Collection[str]) -> None:
        """New rows of these nodes are committed, in place of those that were to be removed. In a
        shared catalogue there are none of these (`_refused_row`)."""
        self._refused = [
            each._replace(nodes=tuple(i for i in each.nodes if i not in ids))
            for each in self._refused
        ]

    def take_back(self, ids: Collection[str]) -> bool:
        """Nodes whose rows are still there are in memory again; False if there is no such row."""
        if self._catalog is None:
            return False
        rows = list(self._catalog.load(ids=ids))
        self._nodes.take_back(rows)
        report(self._catalog.take_faults(), self._metrics)
        return bool(rows)

    def _remove_rows(self, removals: Sequence[Removal]) -> None:
        """Remove rows in one commit, and in another those for which stamps were named."""
        if self._catalog is None:
            return
        removals = [removal for removal in removals if removal.nodes]
        for some in ([r for r in removals if not r.stamps], [r for r in removals if r.stamps]):
            if some:
                nodes = [node for removal in some for node in removal.nodes]
                self._catalog.delete(nodes, [stamp for r in some for stamp in r.stamps])


def _blocks_of(nodes: Sequence[Node]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in node.blocks))


def _each(step: Callable[[Sequence[Node]], None], nodes: Sequence[Node]) -> Ended:
    """Do a step for all nodes at once. If that fails, do it for each alone, so that one failure
    does not affect the others."""
    try:
        step(nodes)
    except KVShareError as error:
        if len(nodes) == 1:
            return [error]
        return [failed for node in nodes for failed in _each(step, [node])]
    return [None] * len(nodes)
