"""Which looks engines have, and what they say of the answers: scores."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.quality.parts import Served
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.score import SCORED_TOKENS, Score
from kvshare_store.save.staging import Save
from kvshare_store.save.verdicts import Verdicts


class Answered(msgspec.Struct, frozen=True):
    """The answer in a node."""

    begins: int = 0
    """At which token; 0: there is none yet."""
    greedy: bool = False
    request: str = ""
    """The engine's name of its request."""
    served: Served = Served()
    """How the rows of its prompt came about."""

    @classmethod
    def of(cls, save: Save, served: Served) -> Answered:
        """What a save says of it."""
        return cls(save.extends, save.greedy, save.request, served)

    def scored(self, node: Node) -> int:
        """How many of its tokens are scored."""
        return min(SCORED_TOKENS, node.length - self.begins) if self.begins else 0


class Given(msgspec.Struct, frozen=True):
    """A look that an engine has."""

    owner: str
    until: float
    node: Node
    answer: Answered
    traffic: str


class Scoring:
    """Of one store. Its looks are guarded by the lock of the nodes."""

    def __init__(self, tree: DeltaTree, quality: Quality) -> None:
        self.verdicts = Verdicts()
        self._quality = quality
        self._tree = tree
        self._given: dict[str, Given] = {}
        """By node. What an engine says may come after the node was settled, and has left."""

    @property
    def bound(self) -> float:
        """The extra rate of divergence that the operator accepts; 0: any."""
        return self._quality.bound

    def give(self, owner: str, now: float, until: float, node: Node, answer: Answered) -> Given:
        """An engine gets a look."""
        self._given = {name: one for name, one in self._given.items() if now < one.until}
        begins = answer.begins
        traffic = self._quality.planned.of(self._tree, node, begins) if begins else ""
        given = self._given[node.id] = Given(owner, until, node, answer, traffic)
        return given

    def take(self, owner: str, node: str, stamp: int) -> Given | None:
        """The look that an engine has ended; None if it had none."""
        given = self._given.get(node)
        if given is None or (given.owner, given.node.stamp) != (owner, stamp):
            return None
        return self._given.pop(node)

    def reap(self, dead_owners: Collection[str]) -> None:
        """Engines are gone: nothing is heard of what they had."""
        self._given = {n: one for n, one in self._given.items() if one.owner not in dead_owners}

    def forget(self, namespace: str) -> None:
        """A namespace was purged."""
        self._given = {n: one for n, one in self._given.items() if one.node.namespace != namespace}
        self.verdicts.forget(namespace)

    def scored(self, given: Given, regrets: tuple[float, ...]) -> None:
        """An engine has scored the answer of a look. Without the lock."""
        node, answer = given.node, given.answer
        if len(regrets) > answer.scored(node):
            return  # more than were asked for: it means something else
        score = Score(
            namespace=node.namespace,
            traffic=given.traffic,
            policy=node.policy or "exact",
            regrets=regrets,
            greedy=answer.greedy,
            control=node.exact,
            computed=answer.served.computed,
            distance=answer.served.distance(answer.begins),
        )
        self.verdicts.scored(
            score, {node.id, node_id(node.namespace, node.tokens, True)}, answer.request
        )
        if len(regrets) == answer.scored(node):  # of fewer nobody knows whether the rest diverges
            self._quality.observe(score)
