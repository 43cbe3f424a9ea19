"""Answers: the node of a prompt grows by the rows of the tokens that were generated after it.

An answer is saved on top of a prompt that the store has. Its rows are taken from that prompt's
node, the base, so only those of the answer are fresh; and the longer node takes the base's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from kvshare_store.commit.node_store import NodeStore
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, node_id, segments_between
from kvshare_store.plan import Span, clip_spans
from kvshare_store.save.staging import Reuse, of_used_blocks

_REMEMBERED = 4096
"""Nodes that longer ones replaced: whoever was planned one of them saves within seconds."""


class Answers:
    """Which node has the rows of a prompt, and what becomes of it when its answer is stored."""

    def __init__(self, nodes: NodeStore) -> None:
        self._nodes = nodes
        self._longer: dict[str, str] = {}
        """By id of a node that was replaced: the one that took its place."""

    def now(self, node: str) -> Node | None:
        """The node of this id, or the longer one that took its place: it begins with its rows."""
        with self._nodes.lock:
            while node not in self._nodes.tree and node in self._longer:
                node = self._longer[node]
            return self._nodes.tree.get(node)

    def base(self, namespace: str, prompt: Tokens, generation: int) -> Node | None:
        """A node that begins with the rows of a prompt of this generation.

        Exact rows may be any node's. Those of an edited prompt are its own node's: another edit of
        the same tokens has other rows.
        """
        same = self.now(node_id(namespace, prompt, generation == 0))
        if generation:
            found = same is not None and same.generation == generation
            return same if found and same is not None and _begins(same, prompt) else None
        nodes = self._sharing(namespace, prompt) if same is None else [same]
        held = (node for node in nodes if node.exact_rows >= len(prompt) and _begins(node, prompt))
        return next(held, None)

    def _sharing(self, namespace: str, prompt: Tokens) -> Iterator[Node]:
        """Nodes that share the longest part of the prompt."""
        index = self._nodes.state.index(namespace)
        if index is None:
            return
        hashes = index.chain.hashes(prompt)
        with self._nodes.lock:
            found = [self._nodes.tree.get(node) for node in index.chain.nominate(hashes)]
        yield from (node for node in found if node is not None)

    def parent(self, base: Node, tokens: Tokens) -> Node | None:
        """What the node of an answer hangs from: the base, or what that hangs from."""
        with self._nodes.lock:
            if not self._replaceable(base, tokens):
                return base
            return self.now(base.parent) if base.parent is not None else None

    def replace(self, base: Node, longer: Node) -> None:
        """The longer node is in the tree: its base goes, unless somebody needs it as it is."""
        with self._nodes.lock:
            if longer.id in self._nodes.tree and self._replaceable(base, longer.tokens):
                self._longer[base.id] = longer.id
                if len(self._longer) > _REMEMBERED:
                    del self._longer[next(iter(self._longer))]
                self._nodes.remove([base.id])

    def _replaceable(self, base: Node, tokens: Tokens) -> bool:
        """Whether nobody misses the base once a node of these tokens is there."""
        here = self._nodes.tree.get(base.id)
        wanted = here is None or here.pinned or bool(self._nodes.tree.children(base.id))
        return not wanted and base.length < len(tokens) and _is_prefix(base.tokens, tokens)


def rows_of(base: Node, length: int) -> Reuse:
    """The first rows of a node, as a save that builds on it names them."""
    exact = min(base.exact_rows, length)
    segments = segments_between(base, 0, length)
    spans = (
        *_marked(clip_spans(segments, 0, exact), exact=True),
        *_marked(clip_spans(segments, exact, length), exact=False),
    )
    generation = base.generation if exact < length else 0
    reuse = Reuse(spans, tuple(base.blocks), (base.id,), generation, (base.stamp,))
    return of_used_blocks(reuse)


def sizes_of(node: Node) -> dict[str, int]:
    """Bytes of a node's blocks, by name, as far as it knows them: one of an older release does
    not."""
    return dict(zip(node.blocks, node.block_bytes, strict=False))


def _marked(spans: Iterable[Span], *, exact: bool) -> Iterator[Span]:
    return (msgspec.structs.replace(span, exact=exact) for span in spans)


def _begins(node: Node, prompt: Tokens) -> bool:
    return _is_prefix(prompt, node.tokens)


def _is_prefix(short: Tokens, long: Tokens) -> bool:
    return np.array_equal(short, long[: len(short)])
