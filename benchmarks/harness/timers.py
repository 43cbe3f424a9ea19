"""Timers around functions of an engine: where the time of a request goes."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any


class Timers:
    """Exclusive seconds by part: what a timed function spends in another one is the other's.

    Only the thread that made the object is timed; what others do at the same time is not on the
    way to the first token.
    """

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._inside: list[float] = []
        """For each timed function that runs now: seconds in timed functions that it called."""
        self._thread = threading.get_ident()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time every call of `owner.name` from now on, as `part`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            with self.timed(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Time the block as `part`."""
        self._inside.append(0.0)
        start = perf_counter()
        try:
            yield
        finally:
            total = perf_counter() - start
            self._seconds[part] += total - self._inside.pop()
            if self._inside:
                self._inside[-1] += total

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        taken, self._seconds = dict(self._seconds), Counter()
        return taken


PARTS = ("lookup", "plan", "load", "rotate", "write", "prefill", "snapshot", "sample", "rest")
"""In the order in which they happen. `rest` is what is left of the time to first token."""


def time_engine(timers: Timers, *, kvshare: bool) -> None:
    """Put timers around the parts of a vLLM engine; before one is made in this process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    timers.wrap(GPUModelRunner, "execute_model", "prefill")
    timers.wrap(GPUModelRunner, "sample_tokens", "sample")
    if not kvshare:
        return
    from kvshare_connectors.vllm.connector import KVShareConnector
    from kvshare_connectors.vllm.paged_cache import PagedCache
    from kvshare_connectors.vllm.scheduler import VirtualRows
    from kvshare_connectors.vllm.worker import Worker
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvshare_store.daemon.link import Link
    from kvshare_store.plan.editor import Editor
    from kvshare_store.tensors.rope import Rope

    timers.wrap(Link, "ask", "lookup")
    timers.wrap(Link, "answer", "lookup")
    timers.wrap(VirtualRows, "schedule", "plan")
    timers.wrap(Scheduler, "schedule", "rest")  # vLLM's own, called by ours
    for name in ("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"):
        timers.wrap(KVShareConnector, name, "plan")
    timers.wrap(Worker, "load", "load")
    timers.wrap(Editor, "edit", "load")
    timers.wrap(Rope, "move", "rotate")
    timers.wrap(PagedCache, "write", "write")
    timers.wrap(Worker, "after_forward", "snapshot")
