"""Rebuilds the tree and the indexes from the catalogue when a store opens."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from kvshare_store.blocks.block_store import BlockStore
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.faults import report
from kvshare_store.errors import MissingBlockError
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vectors
from kvshare_store.observability.metrics import Metrics

Row = tuple[Node, Vectors]

_AT_ONCE = 1 << 13
"""Rows indexed at a time. With fewer the two threads wait for each other more often."""


def recover(
    state: NodeState,
    catalog: Catalog,
    blocks: BlockStore,
    used: Mapping[str, float],
    metrics: Metrics,
) -> list[Node]:
    """Load every node whose blocks are there. It counts as last used at `used` (Unix seconds, by
    id), or when it was made. Returns the other nodes, which are not there in another row either;
    blocks that no node uses are left to the janitor."""
    with _no_collections():
        state.namespaces.recorded(catalog.records.read())
        now = time.time()
        lost: list[Node] = []
        idle: dict[str, tuple[Node, float]] = {}
        with _beside() as do:
            for batch in _larger(catalog.load_batches()):
                found = _complete(batch, blocks, idle.keys(), lost)
                do(partial(state.fill, found))
                for node, _ in (row for rows in found.values() for row in rows):
                    last = max(node.created, used.get(node.id, 0.0))
                    idle[node.id] = node, max(0.0, now - last)
            do(state.settle)
            state.enter(idle.values())
    _give_memory_back()
    lost = [node for node in lost if node.id not in idle]
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


def _larger(batches: Iterable[list[Row]]) -> Iterator[list[Row]]:
    """The same rows, `_AT_ONCE` and more at a time."""
    rows: list[Row] = []
    for batch in batches:
        rows += batch
        if len(rows) >= _AT_ONCE:
            yield rows
            rows = []
    yield rows


@contextlib.contextmanager
def _beside() -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that has work done in another thread, in order. It waits for the work before, so
    that no more than one batch of rows waits."""
    with ThreadPoolExecutor(1, "kvshare-recovery") as pool:
        last: Future[None] = pool.submit(lambda: None)

        def do(work: Callable[[], None]) -> None:
            nonlocal last
            last.result()
            last = pool.submit(work)

        yield do
        last.result()


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
