"""Merging: the rows of one node, scattered over others' blocks, gathered into blocks of its own.

Rows are copied as they are. K stays rotated for the position it was computed at, which the new
segments say; rotating it again would rotate from a copy that is not the root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvshare_store.errors import NamespaceError
from kvshare_store.errors.wording import short
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.node import Node, new_stamp
from kvshare_store.plan.spans import Span
from kvshare_store.tensors.frame import Block


def wants_merge(
    node: Node, tree: DeltaTree, block_tokens: int, max_chain: int, max_scatter: float
) -> bool:
    """Whether the chain above a node is too long, or its rows lie in too many blocks."""
    if node.merged:
        return False
    needed = -(-node.length // block_tokens)
    return len(set(node.blocks)) > max_scatter * needed or tree.chain(node.id) > max_chain


def repacked(segments: Sequence[Span], block_tokens: int) -> tuple[Span, ...]:
    """Segments of the same rows, packed in their order into blocks of `block_tokens` rows."""
    packed: list[Span] = []
    for segment in segments:
        at = segment.start
        while at < segment.stop:
            block, row = divmod(at, block_tokens)
            length = min(segment.stop - at, block_tokens - row)
            source = segment.source + at - segment.start
            span = Span(at, length, source, block, row, segment.exact)
            if packed and _continues(packed[-1], span):
                last = packed.pop()
                span = msgspec.structs.replace(last, length=last.length + length)
            packed.append(span)
            at += length
    return tuple(packed)


def _continues(last: Span, span: Span) -> bool:
    """Whether two neighbours are one run of the same block."""
    one_run = last.source - last.start == span.source - span.start
    return one_run and last.block == span.block and last.exact == span.exact


def merged_node(
    node: Node, blocks: Sequence[str], block_bytes: Sequence[int], block_tokens: int
) -> Node:
    """The node with its rows in `blocks`. Prompt, lineage and provenance are what they were."""
    return msgspec.structs.replace(
        node,
        segments=repacked(node.segments, block_tokens),
        blocks=tuple(blocks),
        block_bytes=tuple(block_bytes),
        merged=True,
        stamp=new_stamp(),
    )


def copy_rows(
    node: Node, start: int, stop: int, read: Callable[[str], Block], target: Any
) -> Block:
    """Copy the rows of positions `start … stop-1` into `target`, a buffer of their size.

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
