"""Purging a lineage: a node goes, and with it what was computed behind its rows.

Nothing waits: whoever has a plan made from these nodes may use it for the request that it has, but
what that request saves is not wanted any more.
"""

from __future__ import annotations

from kvshare_store.commit.queue import Removal
from kvshare_store.commit.repository import Repository
from kvshare_store.errors import NodeError
from kvshare_store.errors.wording import short
from kvshare_store.maintenance.purge import Purged
from kvshare_store.nodes.lineage import Lineage, lineage_of
from kvshare_store.nodes.node import Node
from kvshare_store.save.saving import Saving

_NAMED = 1000
"""Most ids in an answer."""
_LOOKS = 8
"""Somebody who sends the purged prompt again and again must not keep a purge from ending."""


class LineagePurge:
    """One purge of one lineage. Do not hold the lock."""

    def __init__(self, repository: Repository, saving: Saving, node_id: str) -> None:
        """`NodeError` if the node is not here."""
        self._repository = repository
        self._nodes = repository.nodes
        self._saving = saving
        with self._nodes.lock:
            root = self._nodes.tree.get(node_id)
            namespace = None if root is None else self._nodes.namespaces.get(root.namespace)
        if root is None or namespace is None:
            raise NodeError(f"node {short(node_id)} is not in the store")
        self._root = root
        self._namespace = namespace
        self._gone: dict[str, Node] = {}

    def preview(self) -> Purged:
        """What is to be purged."""
        return self._result(self._lineage())

    def run(self) -> Purged:
        """Remove the lineage, pinned nodes too. Durable on return.

        A save that was on its way joins it: from the first removal on none can, so the second look
        finds the last of them. What is found later was sent again.
        """
        for _ in range(_LOOKS):
            lineage = self._lineage()
            if all(node.id in self._gone for node in lineage.nodes):
                break
            self._remove(lineage.nodes)
            # what one of them was to replace comes back if that one could not be stored
            self._repository.queue.settle()
        self._saving.answers.forget_gone()
        result = self._result(lineage)
        self._repository.queue.flush(removed=True)
        return result

    def _lineage(self) -> Lineage:
        return lineage_of(self._root, {**self._found(), **self._gone}.values())

    def _found(self) -> dict[str, Node]:
        """The nodes of the namespace, also those that only other machines have in memory."""
        catalog, digest = self._repository.catalog, self._root.namespace
        found: dict[str, Node] = {}
        if catalog is not None and self._repository.shared:
            catalog.refresh()
            found = {node.id: node for node, _ in catalog.load(digest)}
        with self._nodes.lock:
            here = self._nodes.state.of_namespace(digest)
        return found | {node.id: node for node in here}

    def _remove(self, nodes: tuple[Node, ...]) -> None:
        ids = [node.id for node in nodes]
        with self._nodes.lock:
            self._saving.revoke(nodes)
            self._nodes.remove(ids, whatever=True)
        if self._repository.shared:  # rows of nodes that are not in this machine's memory
            self._nodes.queue.put(Removal(tuple(ids), ()))
        self._gone |= {node.id: node for node in nodes}

    def _result(self, lineage: Lineage) -> Purged:
        gone = {node.id for node in lineage.nodes}
        found = self._found().values()
        used = {name for node in found if node.id not in gone for name in node.blocks}
        names = {name for node in lineage.nodes for name in node.blocks} - used
        return Purged(
            self._root.namespace,
            self._namespace.model,
            len(lineage.nodes),
            len(names),
            unsure=len(lineage.unsure),
            ids=tuple(node.id for node in lineage.nodes[:_NAMED]),
        )
