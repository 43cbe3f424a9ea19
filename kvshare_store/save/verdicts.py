"""Verdicts: what second looks have said of answers. In memory only, without any text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from heapq import nlargest
from typing import Any, NamedTuple

import msgspec

from kvshare_store.bounded import Latest
from kvshare_store.config import policy_names
from kvshare_store.observability.metrics import OTHERS
from kvshare_store.quality.score import Score
from kvshare_store.quality.traffic import edit_of

CONTROL = "control"
"""What answers that were served in full count as, beside the policies of the others."""
_KEPT = 1000
"""Verdicts on nodes, and on requests; the log has as many requests."""
_FLOORS = 256
"""Namespaces whose floor is known."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What full compute says of the first tokens of an answer; nats for each token."""

    scored: int = 0
    """Tokens; 0: the prompt was settled, and its answer was not scored."""
    at: float = 0.0
    """When, Unix seconds."""
    control: bool = False
    """It was served in full."""
    policy: str = ""
    traffic: str = ""
    """The class of its request."""
    greedy: bool = False
    regret: float = 0.0
    """The mean."""
    worst: float = 0.0
    diverged: int | None = None
    """The first token that is not the model's best, of a greedy request."""
    floor: float | None = None
    """The mean regret of the controls of the namespace, of greedy ones if this is one; None: there
    is none yet."""
    floor_answers: int = 0
    settled: float | None = None
    """When the exact rows took the place of the edited ones, Unix seconds."""


class Scored(NamedTuple):
    """A score that a verdict is made of."""

    score: Score
    at: float
    """When it came, Unix seconds."""
    request: str
    """The engine's name of the request; empty if it did not say."""


class Recent(NamedTuple):
    """An answer on approximate rows that was scored."""

    nodes: tuple[str, ...]
    """That it is part of: the edited one and its exact twin. They may have left the store."""
    scored: Scored


class Sum(msgspec.Struct):
    """Of scores."""

    answers: int = 0
    diverged: int = 0
    """Of greedy ones: others cannot."""
    tokens: int = 0
    regret: float = 0.0
    """Of all these tokens together, nats."""

    def add(self, score: Score) -> None:
        """One more."""
        self.answers += 1
        self.diverged += score.diverged is not None
        self.tokens += len(score.regrets)
        self.regret += sum(score.regrets)

    def join(self, other: Sum) -> None:
        """All of another one."""
        self.answers += other.answers
        self.diverged += other.diverged
        self.tokens += other.tokens
        self.regret += other.regret


class Verdicts:
    """Those of one store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_nodes: Latest[str, Scored] = Latest(_KEPT)
        self._of_requests: Latest[str, Scored] = Latest(_KEPT)
        self._settled: Latest[str, tuple[str, float]] = Latest(_KEPT)
        """By exact node, the namespace, and when it took the place of its edited twin."""
        self._sums: dict[str, dict[str, dict[str, Sum]]] = {}
        """By kind of edit (empty of controls), policy (or `CONTROL`) and how tokens were chosen,
        since the store was opened."""
        self._floors: Latest[str, dict[str, Sum]] = Latest(_FLOORS)
        """Of the controls of a namespace, by how tokens were chosen."""

    # --- what is said ------------------------------------------------------------------------

    def scored(self, score: Score, nodes: Iterable[str], request: str) -> None:
        """The answer of a request was scored: it is part of these nodes."""
        scored = Scored(score, time.time(), request)
        kind = counted_as(score.policy, control=score.control)
        with self._lock:
            for node in nodes:
                self._of_nodes[node] = scored
            if request:
                self._of_requests[request] = scored
            edit = "" if score.control else edit_of(score.traffic)
            _add(self._sums.setdefault(edit, {}).setdefault(kind, {}), score)
            if score.control:
                floor = self._floors[score.namespace] = self._floors.get(score.namespace, {})
                _add(floor, score)

    def settled(self, exact: str, namespace: str) -> None:
        """This node has taken the place of its edited twin."""
        with self._lock:
            self._settled[exact] = namespace, time.time()

    def forget(self, namespace: str) -> None:
        """A namespace was purged."""
        with self._lock:
            for kept in (self._of_nodes, self._of_requests):
                for name in [n for n, v in kept.items() if v.score.namespace == namespace]:
                    del kept[name]
            for name in [n for n, (space, _) in self._settled.items() if space == namespace]:
                del self._settled[name]
            self._floors.pop(namespace, None)

    # --- what is asked -----------------------------------------------------------------------

    def of_node(self, node: str) -> dict[str, Any] | None:
        """The `Verdict` on the answer in a node, in plain types; None if nothing is known."""
        with self._lock:
            found, settled = self._of_nodes.get(node), self._settled.get(node)
            if found is None and settled is None:
                return None
            return self._plain(found, settled[1] if settled is not None else None)

    def of_request(self, request: str, namespace: str) -> dict[str, Any] | None:
        """As `of_node`, of the answer to a request. `namespace`: the beginning of its digest."""
        with self._lock:
            found = self._of_requests.get(request)
            if found is None or not found.score.namespace.startswith(namespace):
                return None
            return self._plain(found)

    def worst(self, most: int, namespace: str = "", traffic: str = "") -> list[Recent]:
        """Recent answers on approximate rows with any regret, the highest first, at most so many.
        Greedy ones come before all others, whose regrets have the sampling in them. `namespace`:
        the beginning of a digest; `traffic`: a class."""
        with self._lock:
            found: dict[int, Recent] = {}
            for node, scored in self._of_nodes.items():
                score = scored.score
                meant = score.namespace.startswith(namespace) and traffic in ("", score.traffic)
                if meant and score.regret and not score.control:
                    known = found.get(id(scored), Recent((), scored))
                    found[id(scored)] = known._replace(nodes=(*known.nodes, node))
        return nlargest(most, found.values(), key=_badness)

    def examples(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """By namespace and class the two nodes that were scored last: as a rule one prompt, edited
        and exact."""
        found: dict[tuple[str, str], tuple[str, ...]] = {}
        with self._lock:
            for node, (score, *_) in self._of_nodes.items():
                of = score.namespace, score.traffic
                found[of] = (*found.get(of, ())[-1:], node)
        return found

    def report(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Sums of the scores by policy, those of controls as `CONTROL`, and by how the tokens were
        chosen, `greedy` or `sampled`."""
        found: dict[str, dict[str, Sum]] = {}
        with self._lock:
            for by_policy in self._sums.values():
                for kind, sums in by_policy.items():
                    for chosen, one in sums.items():
                        found.setdefault(kind, {}).setdefault(chosen, Sum()).join(one)
        return {kind: msgspec.to_builtins(sums) for kind, sums in found.items()}

    def by_edit(self) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """As `report`, apart by kind of edit; that of controls is empty."""
        with self._lock:
            return {
                edit: {kind: msgspec.to_builtins(sums) for kind, sums in by_policy.items()}
                for edit, by_policy in self._sums.items()
            }

    def _plain(self, found: Scored | None, settled: float | None = None) -> dict[str, Any]:
        verdict = Verdict(settled=settled)
        if found is not None:
            score = found.score
            floor = self._floors.get(score.namespace, {}).get(_chosen(score))
            verdict = Verdict(
                scored=len(score.regrets),
                at=found.at,
                control=score.control,
                policy=score.policy,
                traffic=score.traffic,
                greedy=score.greedy,
                regret=score.regret,
                worst=max(score.regrets, default=0.0),
                diverged=score.diverged,
                floor=floor.regret / floor.tokens if floor is not None else None,
                floor_answers=floor.answers if floor is not None else 0,
                settled=settled,
            )
        plain: dict[str, Any] = msgspec.to_builtins(verdict)
        return plain


def _badness(recent: Recent) -> tuple[bool, float, float]:
    score = recent.scored.score
    return score.greedy, score.regret, recent.scored.at


def counted_as(policy: str | None, *, control: bool) -> str:
    """The name that an answer is counted under: `CONTROL`, or the policy that it was served under,
    `OTHERS` if that is none of this release."""
    if control:
        return CONTROL
    return policy if policy in policy_names() else OTHERS


def _chosen(score: Score) -> str:
    return "greedy" if score.greedy else "sampled"


def _add(sums: dict[str, Sum], score: Score) -> None:
    sums.setdefault(_chosen(score), Sum()).add(score)
