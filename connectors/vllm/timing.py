"""How long a device takes for the work it is given, which on a GPU is not how long giving takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Seconds = Callable[[], float]
"""Seconds of device time. The call waits until the work is done: not for the engine's thread."""


class Stopwatch(Protocol):
    """Runs from its making until `stop`, in the order of the stream that both are called on."""

    def stop(self) -> Seconds:
        """End the measurement; returns at once."""
        ...


class HostStopwatch:
    """For devices that have done their work when a call returns."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> Seconds:
        seconds = time.perf_counter() - self._started
        return lambda: seconds


class CudaStopwatch:
    """Two events on the current stream: what the GPU did between them, and its idle time there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._event()

    def stop(self) -> Seconds:
        stopped = self._event()

        def seconds() -> float:
            stopped.synchronize()
            return float(self._started.elapsed_time(stopped)) / 1e3

        return seconds

    def _event(self) -> Any:
        # `blocking`: the thread that reads it sleeps instead of spinning beside the engine
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def stopwatch(device: torch.device) -> Stopwatch:
    """A running stopwatch for work on `device`."""
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()
