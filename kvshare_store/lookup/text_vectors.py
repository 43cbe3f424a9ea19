"""Text vectors of stored prompts, made while nobody wants the machine.

One thread hands prompts to a process of the kernel's idle class. While an engine works, and for a
moment after the last lookup or save, that process is stopped. No lookup and no save waits for it.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from typing import NamedTuple

from kvshare_store.bounded import Latest
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.config import StoreConfig
from kvshare_store.errors import InternalError, KVShareError, UnavailableError, UnsupportedError
from kvshare_store.lookup.embedders import text_embeddings_installed
from kvshare_store.lookup.embedding_process import Wanted
from kvshare_store.lookup.embedding_worker import EmbeddingWorker, embedding_command
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import node_id
from kvshare_store.nodes.vectors import Vector, is_vector
from kvshare_store.observability.metrics import Metrics

log = logging.getLogger("kvshare")

_QUIET_S = 1.0
"""The machine counts as idle so long after the last lookup, save or working engine."""
_LATE_S = 600.0
"""A prompt that waited so long is dropped."""
_QUEUED = 1024
_SERVED_BADLY = 4096
_BATCH = 16
"""Vectors that are written to the catalogue in one commit."""
_TICK_S = 0.2
_UNUSED_S = 60.0
"""The process ends after so long without a prompt: a model takes hundreds of megabytes."""
_LONGEST_S = 120.0
"""The process may run so long for one prompt, a model's loading included; then it is stuck."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 600.0
"""Rest after a failure: it doubles while the process keeps failing."""


def wanted(config: StoreConfig) -> bool:
    """Whether prompts get text vectors; `UnsupportedError` if they must and cannot."""
    installed = text_embeddings_installed()
    if config.semantic == "always" and not installed:
        raise UnsupportedError("semantic: always needs `pip install kvshare-store[semantic]`")
    return installed and config.semantic != "never"


class _Job(NamedTuple):
    """Prompts that words alone served badly come first, of those the newest."""

    rank: int
    order: int
    since: float
    node: str


class TextVectors:
    """Thread-safe."""

    def __init__(
        self, config: StoreConfig, nodes: NodeStore, rewriter: Rewriter, metrics: Metrics
    ) -> None:
        self._nodes = nodes
        self._rewriter = rewriter
        self._metrics = metrics
        self._worker = EmbeddingWorker(embedding_command(config.embedder))
        self.jobs: list[_Job] = []
        """Stored prompts that wait for a vector, a heap."""
        self._orders = itertools.count()
        self.served_badly: Latest[str, None] = Latest(_SERVED_BADLY)
        """Ids of prompts that were asked for and found little; they come first once stored."""
        self.busy: set[str] = set()
        """Clients whose engines have requests."""
        self._quiet_from = 0.0
        self._wake = threading.Condition()
        self._wanted = wanted(config)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvshare-text", daemon=True)
        if self._wanted:
            self._thread.start()

    # --- what the store says ---------------------------------------------------------------------

    def working(self, owner: str, busy: bool) -> None:
        """A client's engine has requests, or none any more. While one has, no text is embedded;
        `Store.reap` of the client ends it as well."""
        with self._wake:
            (self.busy.add if busy else self.busy.discard)(owner)
            self._disturb()

    @property
    def engines_work(self) -> bool:
        """Whether the engine of any client has requests."""
        with self._wake:
            return bool(self.busy)

    def gone(self, owners: set[str]) -> None:
        """Clients that ended work no more."""
        with self._wake:
            if not self.busy.isdisjoint(owners):
                self.busy -= owners
                self._wake.notify()

    def looked_up(self, namespace: str, tokens: Tokens, badly: bool) -> None:
        """A prompt was looked up. `badly`: what is stored covers less than half of it."""
        if not self._wanted:
            return
        exact_name = node_id(namespace, tokens, True) if badly else ""
        with self._wake:
            self._disturb()
            if badly:
                self.served_badly[exact_name] = None

    def saved(self, name: str) -> None:
        """A prompt became a node."""
        node = self._nodes.tree.get(name)
        if not self._wanted or node is None:
            return
        exact_name = node.id if node.exact else node_id(node.namespace, node.tokens, True)
        with self._wake:
            self._disturb()
            rank = 0 if self.served_badly.pop(exact_name, 0) is None else 1
            heapq.heappush(self.jobs, _Job(rank, -next(self._orders), time.monotonic(), node.id))
            if len(self.jobs) > _QUEUED:
                self.jobs.remove(max(self.jobs))
                heapq.heapify(self.jobs)
            self._wake.notify()

    def _disturb(self) -> None:
        self._quiet_from = time.monotonic() + _QUIET_S
        self._worker.pause()

    def close(self) -> None:
        """Stop, whatever is queued."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._worker.close()

    # --- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while (job := self._next()) is not None:
            try:
                self._describe(job)
                pause = _FIRST_PAUSE_S
                continue
            except KVShareError as error:
                self._metrics.error(error.kind)
                log.warning("kvshare: no text vector of a prompt: %s", error)
            except Exception:  # a thread must not end in silence
                self._metrics.error(InternalError.kind)
                log.exception("kvshare: text vectors failed")
            self._worker.close()
            self._rest(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        self._worker.close()

    def _rest(self, seconds: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._closed, seconds)

    def _next(self) -> _Job | None:
        """The next prompt, once the machine is idle; None when the store closes."""
        with self._wake:
            while not self._closed:
                if not self.jobs and not self._wake.wait(_UNUSED_S):
                    self._worker.close()
                elif self.jobs and self._idle():
                    return heapq.heappop(self.jobs)
                elif self.jobs:
                    self._wake.wait(_TICK_S)
            return None

    def _idle(self) -> bool:
        return not self.busy and time.monotonic() >= self._quiet_from

    def _describe(self, first: _Job) -> None:
        """Embed a prompt and those that follow it at once, and keep their vectors."""
        found: dict[str, Vector] = {}
        job: _Job | None = first
        try:
            while job is not None:
                vector = self._vector(job)
                if vector is not None:
                    found[job.node] = vector
                with self._wake:
                    more = self.jobs and self._idle() and len(found) < _BATCH
                    job = heapq.heappop(self.jobs) if more and not self._closed else None
        finally:
            if found:
                self._rewriter.describe(found)

    def _vector(self, job: _Job) -> Vector | None:
        node = self._nodes.tree.get(job.node)
        namespace = None if node is None else self._nodes.namespaces.get(node.namespace)
        late = time.monotonic() - job.since > _LATE_S
        if node is None or namespace is None or not namespace.tokenizer or late:
            return None
        self._worker.ask(Wanted(namespace.tokenizer, node.token_bytes))
        if not self._answered():
            return None
        vector = self._worker.answer()
        if vector is None or is_vector(vector):
            return vector
        self._metrics.error(InternalError.kind)
        log.warning(
            "kvshare: the embedding model made no unit vector of 384 numbers: set another "
            "embedder, or semantic: never"
        )
        return None

    def _answered(self) -> bool:
        """Wait for the answer; False if the store closes. `UnavailableError` if the process has run
        too long; the time for which it was stopped does not count."""
        ran = 0.0
        while ran < _LONGEST_S:
            with self._wake:
                if self._closed:
                    return False
                if runs := self._idle():
                    self._worker.resume()
            began = time.monotonic()
            if self._worker.answered(_TICK_S):
                return True
            # longer than a tick: this process was stopped, and the other one probably with it
            ran += min(time.monotonic() - began, _TICK_S) if runs else 0.0
        raise UnavailableError(f"the embedding process is stuck: it ran {ran:.0f} s for a prompt")
