"""The same node in another form: pinned, or merged. Lookups see the old one or the new one.

Row first, then the tree, both in the committer's thread: what is on its way there has been
committed by then, and only another machine can have changed the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kvshare_store.lookup.embedders import Vector
from kvshare_store.shelf import Shelf
from kvshare_store.tree.catalog import Vectors
from kvshare_store.tree.node import Node, new_stamp
from kvshare_store.tree.rows import is_vector

_ATTEMPTS = 4


def pin(shelf: Shelf, node_id: str, pinned: bool) -> bool:
    """Keep a node until it is purged, or no longer; False if it is not here. Durable on return, on
    every machine; `StorageError` if the catalogue refuses."""
    return shelf.committer.run(lambda: _pin(shelf, node_id, pinned))


def _pin(shelf: Shelf, node_id: str, pinned: bool) -> bool:
    for _ in range(_ATTEMPTS):
        with shelf.lock:
            node = shelf.tree.get(node_id)
            vectors = _vectors(shelf, node)
        if node is None or vectors is None:
            return False
        if node.pinned == pinned:
            return True
        changed = msgspec.structs.replace(node, pinned=pinned, stamp=new_stamp())
        if _commit(shelf, node, changed, vectors):
            return _replace(shelf, node, changed)
        _learn_row(shelf, node)
    return False


def _commit(shelf: Shelf, node: Node, changed: Node, vectors: Vectors) -> bool:
    """Write the changed row in the place of the node's; False if another machine's row is there."""
    if shelf.catalog is None or shelf.catalog.replace(changed, vectors, node.stamp):
        return True
    if shelf.shared and shelf.catalog.stamps(ids=[node.id]):
        return False
    shelf.durable.write([changed])  # another machine has removed it
    if shelf.catalog.add([(changed, vectors)]):
        return False
    shelf.durable.confirm([changed])
    return True


def describe(shelf: Shelf, vectors: Mapping[str, Vector]) -> None:
    """Give nodes their text vectors: to lookups now, to the catalogue in the committer's thread,
    which this waits for. Nodes that left are ignored, and vectors that are none."""
    vectors = {node_id: vector for node_id, vector in vectors.items() if is_vector(vector)}
    with shelf.lock:
        for node_id, vector in vectors.items():
            node = shelf.tree.get(node_id)
            index = None if node is None else shelf.index(node.namespace)
            if index is not None:
                index.semantic.add(node_id, vector)
    shelf.committer.run(lambda: _write_vectors(shelf, list(vectors)))


def _write_vectors(shelf: Shelf, ids: Sequence[str]) -> None:
    """In the committer's thread. A row keeps its stamp: vectors only nominate, so no other machine
    has to read it again."""
    with shelf.lock:
        nodes = [node for node_id in ids if (node := shelf.tree.get(node_id)) is not None]
        rows = [(node, vectors) for node in nodes if (vectors := _vectors(shelf, node)) is not None]
    if shelf.catalog is None or not rows:
        return
    if not shelf.shared:
        shelf.catalog.add(rows)
        return
    for node, vectors in rows:
        shelf.catalog.replace(node, vectors, node.stamp)


def _learn_row(shelf: Shelf, node: Node) -> None:
    """Another machine has merged or pinned the node."""
    if shelf.catalog is not None:
        shelf.learn((), list(shelf.catalog.load(ids=[node.id])), {node.id: node.stamp})


def swap(shelf: Shelf, node: Node, merged: Node) -> bool:
    """In the committer's thread: `merged`, whose blocks are in a tier, takes the node's place.

    New blocks durable, then the row, then the tree, then blocks that nobody uses any more are
    removed. False if the node left or changed meanwhile, here or on another machine; then the new
    blocks are removed.
    """
    with shelf.lock:
        vectors = _vectors(shelf, node) if shelf.tree.get(node.id) is node else None
    swapped = False
    try:
        if vectors is not None:
            shelf.durable.write([merged])
            if shelf.catalog is None or shelf.catalog.replace(merged, vectors, node.stamp):
                shelf.durable.confirm([merged])
                swapped = _replace(shelf, node, merged)
    finally:
        if not swapped:
            shelf.sweep(merged.blocks)  # queued: after what was ordered about the row meanwhile
    return swapped


def _replace(shelf: Shelf, node: Node, changed: Node) -> bool:
    """What becomes of the row of a node that left or changed meanwhile is ordered already."""
    with shelf.lock:
        complete = all(shelf.blocks.tier_of(name) for name in changed.blocks)
        if shelf.tree.get(node.id) is not node or not complete:
            return False
        unused = shelf.tree.replace(changed)
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
