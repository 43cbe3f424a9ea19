"""Merging: a node whose rows lie in too many blocks, or whose chain of edits is too long, gets
blocks of its own. Rows are read and copied without the lock."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvshare_store.bounded import pieces_with_pauses
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import KVShareError, MissError, MissingBlockError, NamespaceError
from kvshare_store.errors.wording import short
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.repacking import merged_node, wants_merge
from kvshare_store.save.staging import block_sizes
from kvshare_store.tensors.frame import Block, block_name

log = logging.getLogger("kvshare")

_AT_ONCE = 64
"""Nodes looked at under the lock in one go."""
_MERGES = 8
"""Nodes merged in one pass; the others wait for the next."""
_AGAIN_S, _AGAIN_LATEST_S = 60.0, 86_400.0
"""When a merge that failed is tried again: after the first, twice that after the second, …"""
_SOURCES = 8
"""Blocks kept in memory while rows are gathered from them."""


class _Failed(NamedTuple):
    """How often a merge has failed, and when (monotonic) it is tried again."""

    times: int
    again: float


class Merger:
    """Merges nodes of one store. Not thread-safe: the janitor makes one pass at a time."""

    def __init__(self, config: StoreConfig, nodes: NodeStore, rewriter: Rewriter) -> None:
        self._config = config
        self._nodes = nodes
        self._blocks = nodes.blocks
        self._rewriter = rewriter
        self._failed: dict[str, _Failed] = {}

    def reload(self, config: StoreConfig) -> None:
        """Go on by other settings."""
        self._config = config

    def scattered(self) -> list[Node]:
        """Nodes to merge, the one used last first."""
        config, tree = self._config, self._nodes.tree
        limits = config.block_tokens, config.max_chain, config.max_scatter
        with self._nodes.lock:
            nodes = list(tree)[::-1]
        found: list[Node] = []
        for some in pieces_with_pauses(nodes, _AT_ONCE):
            with self._nodes.lock:
                found += [n for n in some if n.id in tree and wants_merge(n, tree, *limits)]
        return found

    def merge(self, *, patient: bool, stopped: Callable[[], bool]) -> int:
        """One pass; returns how many nodes were merged. A patient one skips nodes whose merge has
        failed lately."""
        merged = 0
        for node in self._mergeable(patient)[:_MERGES]:
            if stopped():
                break
            try:
                merged += self.merge_one(node)
                self._failed.pop(node.id, None)
            except KVShareError as error:  # rows that are gone or lossy, no room, or a refusal
                self._postpone(node)
                level = logging.INFO if isinstance(error, MissError) else logging.WARNING
                log.log(level, "kvshare: node %s was not merged: %s", short(node.id), error)
        return merged

    def _mergeable(self, patient: bool) -> list[Node]:
        """Nodes to merge. Those whose merge has failed come last, or, in a patient pass, later."""
        nodes, now = self.scattered(), time.monotonic()
        ids = {node.id for node in nodes}
        self._failed = {i: failed for i, failed in self._failed.items() if i in ids}
        later = {i for i, failed in self._failed.items() if failed.again > now}
        last = [] if patient else [node for node in nodes if node.id in later]
        return [node for node in nodes if node.id not in later] + last

    def _postpone(self, node: Node) -> None:
        times = self._failed[node.id].times + 1 if node.id in self._failed else 1
        pause = min(_AGAIN_S * 2.0 ** (times - 1), _AGAIN_LATEST_S)
        self._failed[node.id] = _Failed(times, time.monotonic() + pause)

    def merge_one(self, node: Node) -> bool:
        """Give one node blocks of its own; False if it was removed or replaced meanwhile."""
        namespace = self._nodes.namespaces.get(node.namespace)
        if namespace is None:
            return False
        step, row_bytes = self._config.block_tokens, namespace.layout.row_bytes
        sizes = [rows * row_bytes for rows in block_sizes(node.length, step)]
        names = self.gather(node, sizes, step)
        if not names:
            return False
        merged = merged_node(node, names, sizes, step)
        return self._rewriter.swap(node, merged)

    def gather(self, node: Node, sizes: Sequence[int], step: int) -> list[str]:
        """Copy the node's rows into new blocks in the host tier; returns their names, in order."""
        read = functools.lru_cache(_SOURCES)(self._read)
        names: list[str] = []
        try:
            for start, nbytes in zip(range(0, node.length, step), sizes, strict=True):
                stop = min(start + step, node.length)
                names.append(self._copied(node, start, stop, nbytes, read))
        except KVShareError:
            self._nodes.remove_unused(names)
            raise
        return names

    def _copied(
        self, node: Node, start: int, stop: int, nbytes: int, read: Callable[[str], Block]
    ) -> str:
        pool, slot = self._blocks.pool, self._nodes.reserve(nbytes)
        try:
            block = copy_rows(node, start, stop, read, pool.reserved(slot))
            name = block_name(block)
            pool.seal(slot, name, block)
        finally:
            pool.cancel(slot)  # nothing, once it is sealed
        return name

    def _read(self, name: str) -> Block:
        """See `BlockStore.read`. If a block is missing or damaged, the nodes that use it are
        removed."""
        try:
            block = self._blocks.read(name)
        except MissError:
            self._nodes.remove_lost([name])
            raise
        if block.lossy:  # under a new name nobody could tell that the rows were changed
            raise MissingBlockError(f"of block {short(name)} there are only lossy rows")
        return block


def copy_rows(
    node: Node, start: int, stop: int, read: Callable[[str], Block], target: Any
) -> Block:
    """Copy the rows of positions `start … stop-1`, as they are, into `target`, a buffer of their
    size.

    Returns them as a block. `NamespaceError` if a block is not of the node's namespace; what `read`
    raises passes.
    """
    block: Block | None = None
    for segment in node.segments:
        part = segment.clip(start, stop)
        if part is None:
            continue
        block = read(node.blocks[part.block])
        if block.namespace != node.namespace:
            raise NamespaceError(f"a block of node {short(node.id)} belongs to another namespace")
        rows = block.layout.words(block.data, block.rows)
        out = block.layout.words(target, stop - start)
        out[:, :, part.start - start : part.stop - start] = rows[
            :, :, part.row : part.row + part.length
        ]
    if block is None:
        raise NamespaceError(f"node {short(node.id)} has no rows at {start}")
    return Block(node.namespace, block.layout, target)
