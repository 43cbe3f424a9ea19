"""A start: tree and indexes rebuilt from the catalogue."""

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
from kvshare_store.metrics import Metrics
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vectors

Row = tuple[Node, Vectors]


def recover(
    state: NodeState,
    catalog: Catalog,
    blocks: BlockStore,
    used: Mapping[str, float],
    metrics: Metrics,
) -> list[Node]:
    """Every node whose blocks are there, last `used` (Unix seconds, by id) or when it was made.
    Returns the others; blocks that no node uses are left to the janitor."""
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
    """Rows whose blocks are there, by namespace; others are `lost`. A row of a node that is known
    by then is one too many."""
    found: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for node, vectors in batch:
        if not blocks.expect(node.blocks, node.namespace):
            lost.append(node)
        elif node.id not in known:
            found[node.namespace].setdefault(node.id, (node, vectors))
    return {namespace: list(rows.values()) for namespace, rows in found.items()}


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Python looks for garbage the more often the more objects are made; among those of a recovery,
    which all stay, it finds none and takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_memory_back() -> None:
    """What reading the catalogue took and freed stays with the C library in pieces, a third of all
    memory after a recovery, until it is told to return them. Only glibc can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
