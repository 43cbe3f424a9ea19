"""Replaces a node by another form of it: pinned, merged, with more sources or with a text vector. A
lookup sees the old form or the new one.

The row is changed first, then the tree, both in the committer's thread. By then earlier changes of
this machine are committed, so only another machine can have changed the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from kvshare_store.catalog.faults import report
from kvshare_store.commit.repository import Repository
from kvshare_store.nodes.node import Node, new_stamp, with_sources
from kvshare_store.nodes.vectors import Vector, Vectors, is_vector

_ATTEMPTS = 4


class Rewriter:
    """Thread-safe. Do not hold the lock."""

    def __init__(self, repository: Repository) -> None:
        self._queue = repository.queue
        self._nodes = repository.nodes
        self._durable = repository.durable
        self._catalog = repository.catalog
        self._shared = repository.shared
        self._metrics = repository.metrics

    # --- pins, sources -----------------------------------------------------------------------

    def pin(self, node_id: str, pinned: bool) -> bool:
        """Keep a node until it is purged, or no longer; False if it is not here. Durable on return,
        on every machine; `StorageError` if the catalogue refuses."""
        return self._queue.run(
            lambda: self._change(node_id, lambda node: _pinned(node, pinned=pinned))
        )

    def confirm(self, node_id: str, sources: Collection[bytes]) -> None:
        """These sources have sent the prompt of a node too: it remembers that soon, if it is
        here."""
        self._queue.call(lambda: self._change(node_id, lambda node: with_sources(node, sources)))

    def _change(self, node_id: str, change: Callable[[Node], Node]) -> bool:
        """Replace a node by what `change` makes of it, which may be itself."""
        for _ in range(_ATTEMPTS):
            with self._nodes.lock:
                node = self._nodes.tree.get(node_id)
                vectors = None if node is None else self._nodes.state.vectors(node)
            if node is None or vectors is None:
                return False
            changed = change(node)
            if changed is node:
                return True
            changed = msgspec.structs.replace(changed, stamp=new_stamp())
            if self._commit(node, changed, vectors):
                return self._replace(node, changed)
            self._learn_row(node)
        return False

    def _commit(self, node: Node, changed: Node, vectors: Vectors) -> bool:
        """Replace the node's row by the changed one; False if another machine has replaced it."""
        if self._durable.replace(changed, vectors, node.stamp):
            return True
        if self._catalog is None or (self._shared and self._catalog.stamps(ids=[node.id])):
            return False
        self._durable.write([changed])  # another machine has removed it
        if self._durable.add([(changed, vectors)]):
            return False
        self._durable.confirm([changed])
        return True

    def _learn_row(self, node: Node) -> None:
        """Another machine has merged or pinned the node."""
        if self._catalog is not None:
            rows = list(self._catalog.load(ids=[node.id]))
            self._nodes.learn((), rows, {node.id: node.stamp})
            report(self._catalog.take_faults(), self._metrics)

    # --- merges ------------------------------------------------------------------------------

    def swap(self, node: Node, merged: Node) -> bool:
        """Replace a node by `merged`, whose blocks are in a tier.

        First the new blocks become durable, then the row is replaced, then the node in the tree,
        then unused blocks are removed. False if the node was removed or changed meanwhile, here or
        on another machine; then the new blocks are removed.
        """
        return self._queue.run(lambda: self._swap(node, merged))

    def _swap(self, node: Node, merged: Node) -> bool:
        with self._nodes.lock:
            here = self._nodes.tree.get(node.id) is node
            vectors = self._nodes.state.vectors(node) if here else None
        swapped = False
        try:
            if vectors is not None:
                self._durable.write([merged])
                if self._durable.replace(merged, vectors, node.stamp):
                    self._durable.confirm([merged])
                    swapped = self._replace(node, merged)
        finally:
            if not swapped:  # queued: after what was queued about the row meanwhile
                self._nodes.remove_unused(merged.blocks)
        return swapped

    def _replace(self, node: Node, changed: Node) -> bool:
        unused = self._nodes.replace(node, changed)
        if unused is not None:
            self._durable.room.delete(unused)
        return unused is not None

    # --- text vectors ------------------------------------------------------------------------

    def describe(self, vectors: Mapping[str, Vector]) -> None:
        """Give nodes their text vectors: lookups use them at once, and this waits until the
        committer has written them to the catalogue. Unknown nodes and vectors of zeros are
        ignored."""
        vectors = {node_id: vector for node_id, vector in vectors.items() if is_vector(vector)}
        with self._nodes.lock:
            self._nodes.state.describe(vectors)
        self._queue.run(lambda: self._write_vectors(list(vectors)))

    def _write_vectors(self, ids: Sequence[str]) -> None:
        """Rows keep their stamps: vectors only nominate, so no machine needs to read the rows
        again. A node that left and is here again is written when its blocks are durable, which is
        queued."""
        holder = self._nodes.blocks.pool.holder
        with self._nodes.lock:
            here = [node for i in ids if (node := self._nodes.tree.get(i)) is not None]
            nodes = [node for node in here if all(map(holder, node.blocks))]
            found = [(node, self._nodes.state.vectors(node)) for node in nodes]
        rows = [(node, vectors) for node, vectors in found if vectors is not None]
        if not self._shared:
            self._durable.add(rows, new=False)
            return
        for node, vectors in rows:
            self._durable.replace(node, vectors, node.stamp)


def _pinned(node: Node, *, pinned: bool) -> Node:
    return node if node.pinned == pinned else msgspec.structs.replace(node, pinned=pinned)
