"""Rebuilds the tree and the indexes from the catalogue when a store opens."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.faults import report
from kvshare_store.errors import MissingBlockError
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vectors
from kvshare_store.observability.metrics import Metrics

Row = tuple[Node, Vectors]


def recover(
    state: NodeState,
    catalog: Catalog,
    blocks: BlockStore,
    used: Mapping[str, float],
    metrics: Metrics,
) -> list[Node]:
    """Load every node whose blocks are there. It counts as last used at `used` (Unix seconds, by
    id), or when it was made. Returns the other nodes; blocks that no node uses are left to the
    janitor."""
    with _no_collections():
        state.namespaces.recorded(catalog.records.read())
        now = time.time()
        lost: list[Node] = []
        idle: dict[str, tuple[Node, float]] = {}
        for batch in catalog.load_batches():
            found = _complete(batch, blocks, idle.keys(), lost)
            state.fill(found)
            for node, _ in (row for rows in found.values() for row in rows):
                last = max(node.created, used.get(node.id, 0.0))
                idle[node.id] = node, max(0.0, now - last)
        state.settle(idle.values())
    _give_memory_back()
    for _ in lost:
        metrics.error(MissingBlockError.kind)
    report(catalog.take_faults(), metrics)
    return lost


def _complete(
    batch: Iterable[Row], blocks: BlockStore, known: Collection[str], lost: list[Node]
) -> dict[str, list[Row]]:
    """Rows whose blocks are there, by namespace; the others are appended to `lost`. A second row of
    a node is ignored."""
    found: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for node, vectors in batch:
        if not blocks.expect(node.blocks, node.namespace):
            lost.append(node)
        elif node.id not in known:
            found[node.namespace].setdefault(node.id, (node, vectors))
    return {namespace: list(rows.values()) for namespace, rows in found.items()}


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Switch Python's garbage collector off. It runs more often the more objects are made, finds
    nothing among those of a recovery, which all stay, and would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_memory_back() -> None:
    """Return freed memory to the system. Reading the catalogue leaves a third of all memory after a
    recovery with the C library, in pieces; only glibc can be told to return them."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
