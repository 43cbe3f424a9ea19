"""A nominator that remembers whom it named."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.lookup.nominate import Nominator, Rank
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import Hashes
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vector

Named = dict[str, tuple[Node, list[str]]]
"""Candidates by id, and what has named each."""


class Watched(Nominator):
    """Remembers whom it named, and by what."""

    def __init__(
        self,
        state: NodeState,
        namespace: str,
        named: Named,
        only: Node | None,
        without: Collection[str],
        rank: Rank | None = None,
    ) -> None:
        """`named`: where it writes that down. `only`: name nobody else. `without`: never these
        nodes. `rank`: as `Nominator` has it."""
        super().__init__(state.tree, state.index(namespace), state.lock, rank)
        self._state, self._namespace = state, namespace
        self._only, self._without = only, without
        self.named = named

    def by_prefix(self, tokens: Tokens, policies: Collection[str] = ()) -> list[Node]:
        """As `Nominator`."""
        if self._without:  # the index names the prompt itself
            return self._noted("prefix", partial(self._next_best, tokens))
        return self._noted("prefix", partial(super().by_prefix, tokens, policies))

    def _next_best(self, tokens: Tokens) -> list[Node]:
        """Looked for among all."""
        with self._state.lock:
            others = self._state.of_namespace(self._namespace)
        others = [node for node in others if node.id not in self._without]
        others.sort(key=lambda node: common_prefix(tokens, node.tokens), reverse=True)
        return others[:1]

    def by_words(self, vector: Vector, count: int, most: int = 0) -> list[Node]:
        """As `Nominator`."""
        more = len(self._without)
        return self._noted("words", partial(super().by_words, vector, count + more, most + more))

    def by_passages(self, hashes: Hashes, count: int) -> list[Node]:
        """As `Nominator`."""
        return self._noted(
            "passages", partial(super().by_passages, hashes, count + len(self._without))
        )

    def by_text(self, like: Sequence[Node], count: int) -> list[Node]:
        """As `Nominator`."""
        return self._noted("text", partial(super().by_text, like, count))

    def _noted(self, how: str, find: Callable[[], list[Node]]) -> list[Node]:
        if self._only is not None:
            how, found = "asked", [self._only]
        else:
            found = find()
        found = [node for node in found if node.id not in self._without]
        for node in found:
            ways = self.named.setdefault(node.id, (node, []))[1]
            if how not in ways:
                ways.append(how)
        return found
