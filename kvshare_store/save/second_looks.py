"""Edited nodes that an idle engine may compute in full: which are worth it, and who computes which.

docs/design/second_look.md says what becomes of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Annotated, Literal

import msgspec

from kvshare_store.commit.node_store import NodeStore
from kvshare_store.metrics import Metrics
from kvshare_store.nodes.node import Node
from kvshare_store.save.answers import Answers
from kvshare_store.save.staging import Reuse

LOOK_SECONDS = 120.0
"""How long a prompt belongs to the engine that it was given to."""
_MOST = 256
_LATE_S = 600.0
"""Nodes that waited so long are given no more."""
_HALF_LIFE_S = 60.0
"""After so long the next turn of a conversation is half as likely."""
_ANSWERED_S = 60.0
"""A prompt that has no answer by then gets none."""
_TRIES = 3

End = Literal["computed", "dropped", "declined"]


class Look(msgspec.Struct, frozen=True):
    """A stored prompt to compute in full."""

    node: str
    stamp: Annotated[int, msgspec.Meta(ge=0)]
    """Of the form that was given."""
    namespace: str
    """Its digest."""
    tokens: bytes
    """int32, native byte order: the prompt, and its answer where there is one."""


class _Entry(msgspec.Struct):
    """A node of the queue."""

    since: float
    answered: bool
    """Its answer is part of it, so no other is on the way."""
    tries: int = 0
    owner: str = ""
    until: float = 0.0
    """When the lease of `owner` ends."""


class SecondLooks:
    """The queue of one store. Thread-safe under the lock of the nodes; nothing of it is durable."""

    def __init__(
        self,
        nodes: NodeStore,
        answers: Answers,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = nodes
        self._answers = answers
        self._metrics = metrics
        self.clock = clock
        self._entries: dict[str, _Entry] = {}
        """By node, the oldest first."""

    def __len__(self) -> int:
        return len(self._entries)

    # --- what is stored ----------------------------------------------------------------------

    def stored(self, node: Node, base: Node | None, *, adapter: bool) -> None:
        """An edited node is in the tree. `base`: the prompt, if it is an answer's. Hold the lock.

        `adapter`: it belongs to an adapter, and is not queued.
        """
        if base is None or base.id in self._nodes.tree:
            self._metrics.add("edited_stored")
        if adapter:
            self._metrics.add("looks_declined")
            return
        self._entries[node.id] = _Entry(self.clock(), answered=base is not None)
        if len(self._entries) > _MOST:
            del self._entries[next(iter(self._entries))]

    def settled(self, edited: Node) -> None:
        """The exact twin of an edited node is in the tree. Hold the lock."""
        self._entries.pop(edited.id, None)
        self._metrics.add("settled")

    # --- who computes what -------------------------------------------------------------------

    def next(self, owner: str, namespaces: Collection[str], *, working: bool) -> Look | None:
        """The node that is worth most, leased to `owner`; None if there is none.

        Of these namespaces only. `working`: engines have requests, whose answers may be on the way.
        """
        with self._nodes.lock:
            now = self.clock()
            ranked = sorted(self._ranked(now), key=lambda found: -found[0])
            for _, node in ranked:
                entry = self._entries[node.id]
                early = working and not entry.answered and now - entry.since < _ANSWERED_S
                if early or now < entry.until or node.namespace not in namespaces:
                    continue
                if self._answers.base(node.namespace, node.tokens, Reuse()) is not None:
                    del self._entries[node.id]  # a longer exact node begins with it
                    continue
                entry.owner, entry.until, entry.tries = owner, now + LOOK_SECONDS, entry.tries + 1
                self._metrics.add("looks")
                return Look(node.id, node.stamp, node.namespace, node.token_bytes)
            return None

    def _ranked(self, now: float) -> list[tuple[float, Node]]:
        """Nodes that are worth it, with their expected uses; the others are forgotten."""
        found = []
        for name, entry in list(self._entries.items()):
            node = self._nodes.tree.get(name)
            uses = self._expected(node, now - entry.since) if node is not None else 0.0
            over = now - entry.since > _LATE_S or (entry.tries >= _TRIES and now >= entry.until)
            if node is None or uses <= 0 or over:
                del self._entries[name]
            else:
                found.append((uses, node))
        return found

    def _expected(self, node: Node, age: float) -> float:
        """How often the node will be built on: what is saved for each token that is computed."""
        tree = self._nodes.tree
        below = {*tree.users(_last_block(node)), *tree.children(node.id)} - {node.id}
        if not below:
            return float(0.5 ** (age / _HALF_LIFE_S))
        found = (tree.get(name) for name in below)
        leaves = sum(tree.user_count(_last_block(one)) == 1 for one in found if one is not None)
        return leaves - 1.0  # one of them is this conversation, which has gone on

    def ended(self, owner: str, node: str, stamp: int, end: End) -> None:
        """An engine has ended a look. One that is not its own any more is ignored.

        `computed`: the exact node is on its way. `dropped`: somebody else may take it.
        """
        with self._nodes.lock:
            entry = self._entries.get(node)
            if end != "computed":
                self._metrics.add(f"looks_{end}")
            if entry is None or entry.owner != owner or not self._same(node, stamp):
                return
            if end == "declined":
                del self._entries[node]
            elif end == "dropped":
                entry.owner, entry.until, entry.tries = "", 0.0, entry.tries - 1

    def _same(self, node: str, stamp: int) -> bool:
        here = self._nodes.tree.get(node)
        return here is not None and here.stamp == stamp

    def reap(self, dead_owners: Collection[str]) -> None:
        """What engines had that are gone may be given to others."""
        with self._nodes.lock:
            for entry in self._entries.values():
                if entry.owner in dead_owners:
                    entry.owner, entry.until = "", 0.0


def _last_block(node: Node) -> str:
    """It holds the row of the node's last token, which whoever goes on from there uses too."""
    return node.blocks[node.segments[-1].block]
