"""Spans of requests for OpenTelemetry, if vLLM exports its own.

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

if TYPE_CHECKING:
    from vllm.v1.request import Request

Carrier = dict[str, str]
"""The context of a span, in the form of HTTP headers."""
_REQUEST_ID = "gen_ai.request.id"
"""The name that vLLM uses."""


class Trace:
    """The spans of one request, from its arrival to its end."""

    def __init__(self, request: Request) -> None:
        headers = request.trace_headers
        context = TraceContextTextMapPropagator().extract(headers) if headers else None
        self._span = trace.get_tracer("kvshare").start_span(
            f"{PREFIX}request", context, attributes={_REQUEST_ID: request.request_id}
        )
        self.carrier: Carrier = {}
        TraceContextTextMapPropagator().inject(self.carrier, trace.set_span_in_context(self._span))

    def part(self, name: str, seconds: float, **attributes: Any) -> None:
        """Record a part of the request, which has taken so long and ends now."""
        emit(self.carrier, name, seconds, **attributes)

    def end(self, answer: Mapping[str, Any]) -> None:
        """The request has ended, with this report on reuse."""
        self._span.set_attributes(dict(answer))
        self._span.end()


def emit(
    carrier: Carrier, name: str, seconds: float, began: int | None = None, **attributes: Any
) -> None:
    """Record a span as a child of the one with the context `carrier`. `began`: by `time.time_ns`;
    without it the span ends now."""
    length = round(1e9 * seconds)
    start = time.time_ns() - length if began is None else began
    span = trace.get_tracer("kvshare").start_span(
        PREFIX + name,
        TraceContextTextMapPropagator().extract(carrier),
        attributes={PREFIX + key: value for key, value in attributes.items()},
        start_time=start,
    )
    span.end(start + length)
