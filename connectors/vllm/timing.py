"""Measures the time that a device works. On a GPU the launching thread returns long before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Seconds = Callable[[], float]
"""Seconds of device time. Waits until the work is done, so the engine's thread must not call it."""


class Stopwatch(Protocol):
    """Measures from its creation to `stop`, in the order of the current stream."""

    def stop(self) -> Seconds:
        """End the measurement; returns at once."""
        ...


class HostStopwatch:
    """For devices that finish their work before a call returns."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> Seconds:
        seconds = time.perf_counter() - self._started
        return lambda: seconds


class _Event(Protocol):
    """`torch.cuda.Event`, whose methods have no annotations."""

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: _Event) -> float:
        """Milliseconds."""
        ...


class CudaStopwatch:
    """Two events on the current stream; idle time between them counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._event()

    def stop(self) -> Seconds:
        stopped = self._event()

        def seconds() -> float:
            stopped.synchronize()
            return self._started.elapsed_time(stopped) / 1e3

        return seconds

    def _event(self) -> _Event:
        # `blocking`: the thread that reads it sleeps instead of spinning beside the engine
        event: _Event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def emit_span(
    carrier: dict[str, str], name: str, seconds: float, began: int | None = None, **attributes: Any
) -> None:
    """See `tracing.emit`; that module needs OpenTelemetry, which is there where vLLM is told where
    to send traces."""
    from kvshare_connectors.vllm.tracing import emit  # noqa: PLC0415

    emit(carrier, name, seconds, began, **attributes)


def stopwatch(device: torch.device) -> Stopwatch:
    """A running stopwatch for work on `device`."""
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()
