"""Answers: when a request ends, its prompt's node grows by the rows of the generated tokens.

An answer is saved on top of a stored prompt. The prompt's rows are taken from its node, the base,
so only the answer's rows are fresh. The longer node then replaces the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from kvshare_store.bounded import Latest
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, node_id, segments_between
from kvshare_store.plan.contexts import cut_contexts
from kvshare_store.plan.spans import Span, clip_spans
from kvshare_store.save.staging import Reuse, Save, without_unused_blocks

_REMEMBERED = 4096
"""Replaced nodes that are remembered: a client that was planned one saves within seconds, and
people ask for the donor that an answer named."""


class Answers:
    """Which node has the rows of a prompt, and what becomes of it when its answer is stored."""

    def __init__(self, nodes: NodeStore) -> None:
        self._nodes = nodes
        self._longer: Latest[str, str] = Latest(_REMEMBERED)
        """By id of a node that was replaced: the node that replaced it."""

    def now(self, node: str) -> Node | None:
        """The node of this id, or the one that replaced it and begins with the same tokens."""
        with self._nodes.lock:
            while node not in self._nodes.tree and node in self._longer:
                node = self._longer[node]
            return self._nodes.tree.get(node)

    def successors(self, beginning: str) -> list[Node]:
        """The nodes that replaced those whose ids begin so."""
        with self._nodes.lock:
            found = [self.now(old) for old in self._longer if old.startswith(beginning)]
        return list({node.id: node for node in found if node is not None}.values())

    def replaced_before(self, beginning: str) -> list[Node]:
        """The same, from what nodes are: after a restart nobody remembers which were replaced. Of
        several answers to one prompt the first had its place. Looks at the nodes that were used
        last, as many as are remembered else: whoever asks for the status waits meanwhile."""
        with self._nodes.lock:
            nodes = self._nodes.tree.newest(_REMEMBERED)
        found: dict[str, Node] = {}
        for node in sorted(nodes, key=lambda node: node.created):
            for old in _replaced_ids(node):
                if old.startswith(beginning):
                    found.setdefault(old, node)
        return list({node.id: node for node in found.values()}.values())

    def forget_gone(self) -> None:
        """Forget the replaced nodes whose successors have left as well: an id is made of the
        prompt's tokens, and a purge leaves nothing of them."""
        with self._nodes.lock:
            for old in [old for old in self._longer if self.now(old) is None]:
                del self._longer[old]

    def base(self, namespace: str, prompt: Tokens, reuse: Reuse) -> Node | None:
        """A node that begins with the rows of a prompt, computed with `reuse`. The generation and
        contexts of `reuse` say which rows are meant, its donors where to look first."""
        return next(
            (
                node
                for node in self._nominated(namespace, prompt, reuse)
                if _is_prefix(prompt, node.tokens) and _has_rows(node, len(prompt), reuse)
            ),
            None,
        )

    def _nominated(self, namespace: str, prompt: Tokens, reuse: Reuse) -> Iterator[Node]:
        exact = reuse.generation == 0
        for node_name in (*reuse.donors, node_id(namespace, prompt, exact)):
            node = self.now(node_name)
            if node is not None and node.namespace == namespace:
                yield node
        index = self._nodes.state.index(namespace)
        if index is None:
            return
        hashes = index.chain.hashes(prompt)
        with self._nodes.lock:
            chains = (index.chain,) if exact else tuple(index.edited.values())
            names = [name for chain in chains for name in chain.nominate(hashes)]
            found = [self._nodes.tree.get(name) for name in names]
        yield from (node for node in found if node is not None)

    def parent(self, save: Save) -> Node | None:
        """The parent of an answer's node: its base, or the parent of the base if that is
        replaced."""
        base = save.base
        with self._nodes.lock:
            if base is not None and self._replaceable(base, save):
                return self.now(base.parent) if base.parent is not None else None
            return base

    def stored(self, save: Save, node: str) -> None:
        """The node of an answer is in the tree: remove its base, unless something still needs
        it."""
        base = save.base
        with self._nodes.lock:
            if base is None or node not in self._nodes.tree or not self._replaceable(base, save):
                return
            self.replaced(base.id, node)
            self._nodes.remove([base.id], instead=node)

    def replaced(self, node: str, by: str) -> None:
        """A node is about to leave the tree: this one has its place. Hold the lock."""
        self._longer[node] = by

    def _replaceable(self, base: Node, save: Save) -> bool:
        """Whether the answer's node has everything that the base has, and nothing needs the base
        itself."""
        here = self._nodes.tree.get(base.id)
        wanted = here is None or here.pinned or bool(self._nodes.tree.children(base.id))
        same = base.generation == save.reuse.generation and base.contexts == save.reuse.contexts
        longer = base.length < len(save.tokens) and _is_prefix(base.tokens, save.tokens)
        return same and longer and not wanted


def _replaced_ids(node: Node) -> Iterator[str]:
    """Ids of the nodes whose place this one may have: its edited form, its prompt alone."""
    if node.exact:
        yield node_id(node.namespace, node.tokens, False)
    if node.prompt_tokens:
        told = node.tokens[: node.prompt_tokens]
        yield from (node_id(node.namespace, told, exact) for exact in (True, False))


def rows_of(base: Node, length: int) -> Reuse:
    """The first rows of a node, in the form in which a save names the rows that it builds on."""
    exact = min(base.exact_rows, length)
    segments = segments_between(base, 0, length)
    spans = (
        *_marked(clip_spans(segments, 0, exact), exact=True, continued=False),
        *_marked(clip_spans(segments, exact, length), exact=False, continued=True),
    )
    return without_unused_blocks(
        Reuse(
            spans,
            tuple(base.blocks),
            (base.id,),
            base.generation if exact < length else 0,
            (base.stamp,),
            base.policy,
            cut_contexts(base.contexts, length),
        )
    )


def _marked(spans: Iterable[Span], *, exact: bool, continued: bool) -> Iterator[Span]:
    return (msgspec.structs.replace(span, exact=exact, continued=continued) for span in spans)


def _has_rows(node: Node, length: int, reuse: Reuse) -> bool:
    """Whether the first rows of a node with the same tokens are those that `reuse` leads to."""
    if reuse.generation == 0:
        return node.exact_rows >= length
    same = cut_contexts(node.contexts, length) == reuse.contexts
    return same and bool(reuse.contexts) and node.generation == reuse.generation


def _is_prefix(short: Tokens, long: Tokens) -> bool:
    return np.array_equal(short, long[: len(short)])
