"""Repacking: the form of a node whose rows, scattered over others' blocks, lie in its own blocks.

K stays rotated for the position it was computed at, which the new segments say; rotating it again
would rotate from a copy that is not the root.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.node import Node, new_stamp
from kvshare_store.plan.spans import Span


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
