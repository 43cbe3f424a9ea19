"""What vLLM is promised of a plan, and whether the request is parked until it is there."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare_connectors.vllm.requests import Promise, RequestState

from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Span, clip_spans, gaps


def promise_of(
    state: RequestState, local: int, *, places_runs: bool, min_saving_ms: float
) -> Promise:
    """The rows of the request's plan past the `local` tokens that vLLM's own cache covers.

    `places_runs`: whether the scheduler computes placeholder runs; else exact rows only.
    """
    if state.plan is None:
        return Promise(local, [])
    spans = clip_spans(state.plan.spans, local, state.length - 1)
    if not places_runs:
        spans = [span for span in spans if span.exact]
    if not saves_enough(state.plan, spans, min_saving_ms):
        return Promise(local, [], "engine_prefix" if places_runs else "plain_scheduler")
    return Promise(local, spans, parks=not places_runs or _parks(state, local, spans))


def saves_enough(plan: ReusePlan, spans: Sequence[Span], min_saving_ms: float) -> bool:
    """Whether what vLLM's own cache leaves of the plan is worth loading."""
    reused = sum(span.length for span in spans)
    return plan.saving_ms * reused >= min_saving_ms * plan.reused and reused > 0


def _parks(state: RequestState, local: int, spans: Sequence[Span]) -> bool:
    """Whether placeholder runs do not fit into this step, so that the request waits for them.

    With vLLM's own schedulers every request with a hit is parked: some of vLLM's runners mishandle
    a failed load of a running request (see `Recovery._handle_invalid_blocks`).
    """
    runs = gaps(spans, local, spans[-1].stop)
    return bool(runs) and not state.reserved.holds(runs)
