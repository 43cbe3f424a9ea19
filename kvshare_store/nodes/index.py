"""What nominates donors in one namespace: prefix chains, anchors of passages, and two matrices of
vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvshare_store.nodes.grams import anchors, gram_hashes
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.postings import Postings
from kvshare_store.nodes.prefix_chain import CHAIN_RUN, PrefixChain
from kvshare_store.nodes.vector_matrix import VectorMatrix
from kvshare_store.nodes.vectors import Vectors, joined

LONG = 1 << 11
"""Prompts of so many tokens and more are also known by their anchors."""


class NamespaceIndex:
    """Everything that nominates donors inside one namespace."""

    def __init__(self, run: int = CHAIN_RUN) -> None:
        self._run = run
        self.chain = PrefixChain(run)
        """Of exact rows."""
        self.edited: dict[str, PrefixChain] = {}
        """Of all rows of edited nodes, by the policy that they were made under."""
        self.passages = Postings()
        """Long prompts by their anchors: long prompts have much the same words, whoever wrote them,
        and so much the same vectors."""
        self.lexical = VectorMatrix()
        self.semantic = VectorMatrix()

    def add(self, node: Node, vectors: Vectors) -> None:
        """Index a node."""
        self.chain.add(node.id, node.tokens[: node.exact_rows])
        if not node.exact:
            self._edited(node.policy).add(node.id, node.tokens)
        if node.length >= LONG and node.id not in self.passages:
            self.passages.add(node.id, anchors(gram_hashes(node.tokens)).tolist())
        self.lexical.add(node.id, vectors.lexical)
        if vectors.semantic is not None:
            self.semantic.add(node.id, vectors.semantic)

    def extend(self, nodes: Sequence[tuple[Node, Vectors]]) -> None:
        """Index many nodes that are not here yet."""
        self.chain.extend([(node.id, node.tokens[: node.exact_rows]) for node, _ in nodes])
        for policy in {node.policy for node, _ in nodes if not node.exact}:
            same = [n for n, _ in nodes if not n.exact and n.policy == policy]
            self._edited(policy).extend([(node.id, node.tokens) for node in same])
        self._extend_passages([node for node, _ in nodes if node.length >= LONG])
        lexical = joined([vectors.lexical for _, vectors in nodes]).reshape(len(nodes), -1)
        self.lexical.extend([node.id for node, _ in nodes], lexical)
        text = {node.id: each.semantic for node, each in nodes if each.semantic is not None}
        if text:
            self.semantic.extend(list(text), np.stack(list(text.values())))

    def _extend_passages(self, nodes: Sequence[Node]) -> None:
        new = [node for node in nodes if node.id not in self.passages]
        if new:
            keys = [anchors(gram_hashes(node.tokens)) for node in new]
            whose = np.arange(len(new)).repeat([len(each) for each in keys])
            self.passages.extend([node.id for node in new], np.concatenate(keys), whose)

    def settle(self) -> None:
        """Do now what the first question after `extend` would wait for."""
        for chain in (self.chain, *self.edited.values()):
            chain.settle()
        self.passages.settle()

    def _edited(self, policy: str) -> PrefixChain:
        return self.edited.setdefault(policy, PrefixChain(self._run))

    def remove(self, node: Node) -> None:
        """Forget a node."""
        for chain in (self.chain, *self.edited.values()):
            chain.remove(node.id)
        self.passages.remove(node.id)
        self.lexical.remove(node.id)
        self.semantic.remove(node.id)

    def __len__(self) -> int:
        return len(self.lexical)
