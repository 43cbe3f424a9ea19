"""Spans of requests for OpenTelemetry, where vLLM is told where to send its own.

They belong to the trace that the client's headers name, beside vLLM's `llm_request`.
`kvshare.request` is the parent of the others; workers get its context with their orders.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.settings import PREFIX
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvshare_store.plan import gaps

if TYPE_CHECKING:
    from kvshare_connectors.vllm.requests import RequestState
    from vllm.v1.request import Request

Carrier = dict[str, str]
"""The context of a span, as HTTP headers have it."""
_REQUEST_ID = "gen_ai.request.id"
"""As vLLM calls it."""


class Trace:
    """The spans of one request, from its arrival to its end."""

    def __init__(self, request: Request) -> None:
        headers = request.trace_headers
        context = TraceContextTextMapPropagator().extract(headers) if headers else None
        self._request = request
        self._span = trace.get_tracer("kvshare").start_span(
            f"{PREFIX}request", context, attributes={_REQUEST_ID: request.request_id}
        )
        self.carrier: Carrier = {}
        TraceContextTextMapPropagator().inject(self.carrier, trace.set_span_in_context(self._span))
        self._loading_at: float | None = None
        self._left = 0
        """Tokens of its prompt that are computed beside what is loaded."""

    def part(self, name: str, began: float, **attributes: Any) -> None:
        """A part of the request ends now; `began`: by `time.monotonic`."""
        emit(self.carrier, name, time.monotonic() - began, **attributes)

    def loading(self, state: RequestState) -> None:
        """vLLM has taken the promise of its plan: its rows are loaded in this step."""
        saving_ms = state.plan.saving_ms if state.plan is not None else 0.0
        self.part("plan", state.planned_at, saving_ms=saving_ms)
        self._loading_at = time.monotonic()
        self._left = sum(run.length for run in gaps(state.loaded, state.local, state.length))

    def look(self) -> None:
        """Each step: a prompt that is computed has a first token."""
        if self._loading_at is not None and self._request.num_output_tokens:
            self.part("partial_prefill", self._loading_at, computed=self._left)
            self._loading_at = None

    def end(self, answer: Mapping[str, Any]) -> None:
        """The request has ended, with this report on reuse."""
        self.look()
        self._span.set_attributes(dict(answer))
        self._span.end()


def emit(carrier: Carrier, name: str, seconds: float, **attributes: Any) -> None:
    """A span that ends now, below the one that `carrier` has the context of."""
    now = time.time_ns()
    span = trace.get_tracer("kvshare").start_span(
        PREFIX + name,
        TraceContextTextMapPropagator().extract(carrier),
        attributes={PREFIX + key: value for key, value in attributes.items()},
        start_time=now - round(1e9 * seconds),
    )
    span.end(now)
