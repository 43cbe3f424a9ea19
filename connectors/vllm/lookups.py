"""Lookups of requests: started early, waited for until a deadline, given up when not needed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from kvshare_connectors.vllm.metrics import Tally
from kvshare_connectors.vllm.requests import RequestState, Reserved

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import plan_request
from kvshare_store.daemon.link import Link
from kvshare_store.errors import DeadlineError
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.plan import Outcome

LOOK_AHEAD = 8
"""How many requests may hold a plan before vLLM admits them: a plan pins blocks in memory."""
_BUSY_WAIT_S = 0.005
"""How long a step with other work waits for plans. The next step asks again."""


class Lookups:
    """One per engine; called only from the scheduler's thread."""

    def __init__(self, config: StoreConfig, link: Link, tally: Tally) -> None:
        self._config = config
        self.link = link
        self._tally = tally
        self._heads: list[RequestState] = []
        self._late: list[RequestState] = []
        """Requests that ended, or whose namespace was replaced, before their plan came."""
        self._wait_until = 0.0
        self.wiped = ""
        """That of the newest plan (see `ReusePlan.wiped`)."""
        self.exact_only = True
        """Ask for exact rows only: the scheduler computes no placeholders, or another connector
        would store edited rows as exact."""

    def ask(self, state: RequestState) -> None:
        """Start the lookup, unless it was started or there is nothing to look up."""
        if state.looked_up or state.asked is not None:
            return
        tokens = as_tokens(state.request.prompt_token_ids or ())
        policy = "exact" if self.exact_only else state.policy
        pools = () if state.look else state.pools
        about = tokens, state.namespace, policy, state.id
        question = plan_request(*about, look=state.look, pools=pools, source=state.source)
        state.asked = self.link.ask(question)
        state.asked_at = time.monotonic()
        if state.asked is None:
            state.looked_up, state.reason = True, "unavailable"

    def ask_early(self, state: RequestState) -> None:
        """As `ask`, for a request that no step waits for yet."""
        self.ask(state)
        state.early = True

    def collect(self, state: RequestState, seconds: float) -> None:
        """Wait up to `seconds` for the plan. Past its deadline the request is a miss."""
        if state.looked_up or state.asked is None:
            return
        wanted_at = state.wanted_at = state.wanted_at or time.monotonic()
        left = self._left(state)
        if not self._take(state, state.asked, min(seconds, left)) and left <= seconds:
            self.link.give_up(state.asked)
            state.looked_up, state.reason = True, "deadline"
        if state.looked_up:
            if not state.look:
                self._tally.looked_up(time.monotonic() - wanted_at)
            if state.trace is not None:
                took = time.monotonic() - state.asked_at
                state.trace.part("lookup", took, reason=state.reason)

    def _left(self, state: RequestState) -> float:
        """Seconds until the lookup's deadline."""
        return state.asked_at + self._config.plan_deadline_ms / 1e3 - time.monotonic()

    def _take(self, state: RequestState, asked: bytes, seconds: float) -> bool:
        """Take the plan if it comes within `seconds`; returns whether it did."""
        try:
            plan = self.link.answer(asked, max(0.0, seconds))
        except DeadlineError:
            return False
        state.looked_up = True
        state.planned_at = time.monotonic()
        state.stored = plan
        state.reason = "unavailable" if plan is None else plan.declined
        if plan is not None and plan.wiped:
            self.wiped = plan.wiped
        if plan is not None and plan.spans:
            state.plan = plan
        return True

    def look_ahead(self, states: Iterable[RequestState], *, busy: bool) -> list[RequestState]:
        """Look up the requests that this step may admit; returns their states in order."""
        for state in self._heads:
            state.reserved = Reserved()
        self._heads = heads = list(states)
        for state in heads:
            self._refresh(state)
            self.ask(state)
        patience = _BUSY_WAIT_S if busy else self._config.plan_deadline_ms / 1e3
        self._wait_until = time.monotonic() + patience
        for state in heads:
            self.collect(state, self.patience())
        self._collect_late()
        return heads

    def patience(self) -> float:
        """Seconds that this step may still wait for plans."""
        return max(0.0, self._wait_until - time.monotonic())

    def _refresh(self, state: RequestState) -> None:
        """Ask again for a plan that waited in the queue for half its lease.

        So too where the lookup that began at the request's arrival missed its deadline.
        """
        waited = time.monotonic() - state.planned_at
        early, state.early = state.early, False
        if state.plan is not None and waited > self._config.lease_seconds / 2:
            self.give_up(state, "queued_too_long")
            state.ask_again()
        elif early and self._too_late(state):
            self._late.append(replace(state))
            state.ask_again()

    def _too_late(self, state: RequestState) -> bool:
        """Whether the deadline of its lookup has passed without a plan."""
        if state.looked_up or state.asked is None or self._left(state) > 0:
            return False
        return not self._take(state, state.asked, 0.0)

    # --- plans that nobody loads -------------------------------------------------------------

    def give_up(self, state: RequestState, reason: str) -> None:
        """Load nothing of the plan: end its lease and tell the daemon why."""
        if state.plan is not None:
            computed = state.length - state.local
            outcome = Outcome(failed=reason, recomputed=computed, cached=state.local)
            self.link.tell(protocol.Finish(state.plan.lease, outcome))
            state.plan, state.reason, state.cached_counted = None, reason, True

    def count_cached(self, state: RequestState) -> None:
        """Tell the daemon what vLLM's own cache had of a request that was counted as a miss."""
        if state.local and not state.cached_counted and not state.look:
            self.link.tell(protocol.EngineCached(state.local, state.label))
            state.cached_counted = True

    def ended(self, state: RequestState) -> None:
        """The request has ended: give up the plan that it did not load."""
        self._let_go(state, "aborted", 0.0 if self._late else _BUSY_WAIT_S)

    def abandon(self, state: RequestState, reason: str) -> None:
        """Drop plan and lookup; the request goes on and may be looked up again."""
        self._let_go(replace(state), reason, 0.0)
        state.plan = None
        state.ask_again()

    def _let_go(self, state: RequestState, reason: str, seconds: float) -> None:
        self.collect(state, seconds)
        if not state.looked_up and state.asked is not None:
            self._late.append(state)
        elif not state.loaded:
            self.give_up(state, reason)

    def _collect_late(self) -> None:
        waiting, self._late = self._late, []
        for state in waiting:
            self._let_go(state, "aborted", 0.0)
