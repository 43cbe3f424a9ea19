"""Plans that have not ended, and the nodes that they were made from."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import NamedTuple

from kvshare_store.bounded import Latest
from kvshare_store.errors import PlanError
from kvshare_store.lookup.request_log import Asked
from kvshare_store.nodes.node import Node
from kvshare_store.plan import Outcome, ReusePlan

_LONGEST_REASON = 64
_REMEMBERED = 1 << 16
_CLOCKS_DIFFER_S = 1.0
"""A load may be timed on a device."""


class OpenPlan(NamedTuple):
    """What the store remembers of a plan until it ends."""

    asked: Asked
    plan: ReusePlan
    tier: str
    """The slowest that its rows came from."""
    donors: tuple[Node, ...]
    """As they were planned: what is saved on top of the plan is checked against them."""
    made: float
    """When the plan was there, by `perf_counter`."""

    @property
    def tokens(self) -> int:
        """Length of the request."""
        return self.asked.tokens

    @property
    def began(self) -> float:
        """When the plan was asked for, by `perf_counter`."""
        return self.asked.start

    def check(self, outcome: Outcome) -> None:
        """`PlanError` if this is not what can become of the plan."""
        reused = self.plan.reused
        loaded = outcome.exact + outcome.edited + outcome.continued
        numbers = (loaded, outcome.exact, outcome.edited, outcome.recomputed, outcome.nbytes)
        possible = (
            min(outcome.continued, *numbers) >= 0
            and loaded <= reused
            and loaded + outcome.recomputed <= self.tokens
            and outcome.cached <= self.tokens
            and outcome.nbytes <= reused * self.asked.namespace.layout.row_bytes
            and 0.0 <= outcome.seconds <= perf_counter() - self.began + _CLOCKS_DIFFER_S
            and len(outcome.failed) <= _LONGEST_REASON
        )
        if not possible:
            raise PlanError(f"{outcome} cannot be the outcome of a plan for {self.tokens} tokens")


class OpenPlans:
    """Plans that have not ended, by their leases, and the nodes they were made from. Not
    thread-safe."""

    def __init__(self) -> None:
        self._plans: dict[str, OpenPlan] = {}
        self._forms: dict[str, dict[int, list[Node]]] = {}
        """By id and by form: the node, once for each plan."""
        self._revoked: Latest[tuple[str, int], None] = Latest(_REMEMBERED)
        """Forms of nodes that vouch for nothing, by id and stamp."""

    def add(self, lease: str, plan: OpenPlan) -> None:
        """A plan was made."""
        self._plans[lease] = plan
        for node in plan.donors:
            self._forms.setdefault(node.id, {}).setdefault(id(node), []).append(node)

    def get(self, lease: str) -> OpenPlan | None:
        """The plan with this lease; None if it has ended."""
        return self._plans.get(lease)

    def pop(self, lease: str) -> OpenPlan | None:
        """A plan has ended; None if there was none with this lease."""
        plan = self._plans.pop(lease, None)
        for node in plan.donors if plan is not None else ():
            forms = self._forms[node.id]
            forms[id(node)].pop()
            if not forms[id(node)]:
                del forms[id(node)]
            if not forms:
                del self._forms[node.id]
        return plan

    def donors(self, node_id: str) -> list[Node]:
        """The forms of a node that open plans were made from, each once, but for revoked ones."""
        forms = (same[0] for same in self._forms.get(node_id, {}).values())
        return [node for node in forms if (node.id, node.stamp) not in self._revoked]

    def forms(self) -> list[Node]:
        """The forms of nodes that open plans were made from, each once."""
        return [same[0] for forms in self._forms.values() for same in forms.values()]

    def revoke(self, nodes: Iterable[Node]) -> None:
        """From now on nobody may build on these forms of nodes, whatever plan he has or gets."""
        for node in nodes:
            self._revoked[node.id, node.stamp] = None
