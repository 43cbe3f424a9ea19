"""The beginning of a prompt: what is kept where the end of it must go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from kvshare_store.nodes.node import Node, new_stamp, node_id
from kvshare_store.plan.spans import Span, of_used_blocks


def beginning(node: Node, nbytes: int, users: Callable[[str], int]) -> Node | None:
    """The longest beginning of an exact node that frees `nbytes` bytes of rows, and ends with rows
    that no other node has. None if there is none.

    `users`: how many nodes use a block.
    """
    segments, freed = list(node.segments), 0
    left = Counter(segment.block for segment in segments)
    while segments:
        block = segments[-1].block
        alone = users(node.blocks[block]) == 1
        if alone and freed >= nbytes:
            break
        segments.pop()
        left[block] -= 1
        if alone and not left[block]:
            freed += node.block_bytes[block] if node.block_bytes else 0
    return _node_of(node, segments) if segments else None


def _node_of(node: Node, segments: Sequence[Span]) -> Node:
    kept, used = of_used_blocks(segments)
    length = segments[-1].stop
    tokens = node.tokens[:length]
    return msgspec.structs.replace(
        node,
        id=node_id(node.namespace, tokens, True),
        token_bytes=tokens.tobytes(),
        parent=None,
        edits=(),
        segments=kept,
        blocks=tuple(node.blocks[block] for block in used),
        block_bytes=tuple(node.block_bytes[block] for block in used) if node.block_bytes else (),
        exact_rows=length,
        prompt_tokens=node.prompt_tokens if node.prompt_tokens < length else 0,
        stamp=new_stamp(),
    )
