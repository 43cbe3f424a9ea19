"""The same node in another form: pinned, or merged. Lookups see the old one or the new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kvshare_store.lookup.embedders import Vector
from kvshare_store.shelf import Shelf
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.node import Node


def pin(shelf: Shelf, node_id: str, pinned: bool) -> bool:
    """Keep a node until it is purged, or no longer; False if it is not here. Durable soon after."""
    with shelf.lock:
        node = shelf.tree.get(node_id)
        if node is None:
            return False
        if node.pinned != pinned:
            shelf.tree.replace(msgspec.structs.replace(node, pinned=pinned))
            shelf.committer.call(lambda: _commit_again(shelf, [node_id]))
        return True


def describe(shelf: Shelf, vectors: Mapping[str, Vector]) -> None:
    """Give nodes their text vectors: to lookups now, to the catalogue in the committer's thread,
    which this waits for. Nodes that left are ignored."""
    with shelf.lock:
        for node_id, vector in vectors.items():
            node = shelf.tree.get(node_id)
            index = None if node is None else shelf.index(node.namespace)
            if index is not None:
                index.semantic.add(node_id, vector)
    shelf.committer.run(lambda: _commit_again(shelf, list(vectors)))


def _commit_again(shelf: Shelf, ids: Sequence[str]) -> None:
    """In the committer's thread: the nodes' rows as the nodes are now."""
    with shelf.lock:
        nodes = [node for node_id in ids if (node := shelf.tree.get(node_id)) is not None]
        rows = [(node, vectors) for node in nodes if (vectors := _vectors(shelf, node)) is not None]
    if rows and shelf.catalog is not None:
        shelf.catalog.add(rows)


def swap(shelf: Shelf, node: Node, merged: Node) -> bool:
    """In the committer's thread: `merged`, whose blocks are in a tier, takes the node's place.

    New blocks durable, then the row, then the tree, then blocks that nobody uses any more are
    removed. False if the node left or changed meanwhile; then the new blocks are removed.
    """
    with shelf.lock:
        vectors = _vectors(shelf, node) if shelf.tree.get(node.id) is node else None
    swapped = False
    try:
        if vectors is not None:
            shelf.durable.write([merged])
            if shelf.catalog is not None:
                shelf.catalog.add([(merged, vectors)])
            swapped = _replace(shelf, node, merged)
    finally:
        if not swapped:
            shelf.sweep(merged.blocks)  # queued: after what was ordered about the row meanwhile
    return swapped


def _replace(shelf: Shelf, node: Node, merged: Node) -> bool:
    """What becomes of the row of a node that left or changed meanwhile is ordered already."""
    with shelf.lock:
        complete = all(shelf.blocks.tier_of(name) for name in merged.blocks)
        if shelf.tree.get(node.id) is not node or not complete:
            return False
        unused = shelf.tree.replace(merged)
    shelf.blocks.delete(unused)
    return True


def _vectors(shelf: Shelf, node: Node | None) -> Vectors | None:
    if node is None:
        return None
    index = shelf.index(node.namespace)
    lexical = None if index is None else index.lexical.get(node.id)
    if index is None or lexical is None:
        return None
    return Vectors(lexical, index.semantic.get(node.id))
