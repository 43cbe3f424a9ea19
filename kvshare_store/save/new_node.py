"""Makes the node of a staged save. It needs no rows, only the places where they will lie."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare_store.lookup.align import align
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import edit_script
from kvshare_store.nodes.node import SOURCES, Node, check_segments, new_stamp, node_id
from kvshare_store.save.staging import Save, contexts_of_rows, exact_rows, fresh_segments


def id_of(save: Save) -> str:
    """The id of the node that a staged save becomes."""
    return node_id(save.namespace.digest, save.tokens, save.reuse.generation == 0)


def stored_as(tree: DeltaTree, save: Save) -> str | None:
    """The id of a node that already has the prompt, with rows that are at least as exact; or
    None."""
    exact, own = node_id(save.namespace.digest, save.tokens, True), id_of(save)
    return next((node for node in (exact, own) if node in tree), None)


def new_node(save: Save, fresh: Sequence[str], parent: Node | None) -> Node:
    """The node of a staged save.

    `fresh`: names of the blocks with its fresh rows, one for each of `save.staged.sizes`. `parent`:
    its first donor in the same namespace, if that is still here. A pool's node is pinned from the
    start. `PlanError` if the rows do not cover the prompt.
    """
    reuse, kept, length = save.reuse, save.kept, len(save.tokens)
    sizes = save.staged.sizes
    segments = [*kept.spans, *fresh_segments(save.staged.fresh, sizes, len(kept.blocks))]
    segments.sort(key=lambda segment: segment.start)
    blocks = (*kept.blocks, *fresh)
    check_segments(segments, length, len(blocks))
    matches = align(save.tokens, parent.tokens) if parent else []
    row_bytes = save.namespace.layout.row_bytes
    return Node(
        id=id_of(save),
        namespace=save.namespace.digest,
        token_bytes=save.tokens.tobytes(),
        parent=parent.id if parent else None,
        edits=edit_script(matches, parent.length, save.tokens) if parent else (),
        segments=tuple(segments),
        blocks=blocks,
        block_bytes=(*save.block_bytes, *(rows * row_bytes for rows in sizes)),
        exact_rows=exact_rows(reuse.spans, length),
        generation=reuse.generation,
        policy=save.policy,
        contexts=contexts_of_rows(reuse, length),
        stamp=new_stamp(),
        pinned=bool(save.namespace.pool),
        sources=save.sources[:SOURCES],
        prompt_tokens=save.extends,
    )
