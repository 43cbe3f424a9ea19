"""A worker's messages to the daemon: finished loads, failures, prompts to store."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from kvshare_connectors.vllm.containment import log_once
from kvshare_connectors.vllm.metadata import SaveSpec
from kvshare_connectors.vllm.raw_blocks import RawBlocks
from kvshare_connectors.vllm.timing import emit_span

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import place_of
from kvshare_store.daemon.protocol import Role
from kvshare_store.errors import (
    DeadlineError,
    InternalError,
    KVShareError,
    NoSpaceError,
    UnavailableError,
)
from kvshare_store.observability.threads import Health, Supervised
from kvshare_store.plan.editor import Editor
from kvshare_store.save.staging import Staged
from kvshare_store.tensors.layout import KVLayout

log = logging.getLogger("kvshare")

Message = protocol.Request | Callable[[], protocol.Request]
"""A message, or what makes it when its turn comes; that may wait for the device."""


class Snapshot(NamedTuple):
    """Raw copies of the paged blocks that hold the fresh rows of a prompt."""

    spec: SaveSpec
    raw: RawBlocks
    positions: torch.Tensor
    """int64: offsets of the fresh rows inside `raw`."""
    nbytes: int


class Saver:
    """Sends everything to the daemon in order, from one thread with one client."""

    def __init__(self, config: StoreConfig, layout: KVLayout, role: Role = "engine") -> None:
        """`role`: that of its connection."""
        self.config = config
        self._role: Role = role
        self._place = place_of(config)  # what is wrong with its keys is said at the start
        self._layout = layout
        self._queue: queue.Queue[Snapshot | Message | None] = queue.Queue()
        self.waiting_bytes = 0
        self._counting = threading.Lock()
        self._thread = Supervised("kvshare-saver", self._run, Health())

    def tell(self, message: Message) -> None:
        """Queue a message; its answer is dropped."""
        self._queue.put(message)

    def failed(self, error: KVShareError) -> None:
        """Log and count a failure that the engine survives."""
        log_once(error)
        self.tell(protocol.Failed(str(error.kind)))

    def check_room(self) -> None:
        """Raise `NoSpaceError` while too many bytes wait to be stored.

        Memory must not fill up while the daemon is slow or away.
        """
        if self.waiting_bytes > self.config.host_bytes // 2:
            raise NoSpaceError("prompts wait to be stored and fill half of host_bytes")

    def store(self, snapshot: Snapshot) -> None:
        """Queue a prompt."""
        self._count(snapshot, 1)
        self._queue.put(snapshot)

    def _count(self, snapshot: Snapshot, sign: int) -> None:
        with self._counting:
            self.waiting_bytes += sign * snapshot.nbytes

    def wait(self) -> None:
        """Wait until everything queued so far has been sent to the daemon."""
        self._queue.join()

    def close(self) -> None:
        """Finish the queue and stop."""
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        client = Client(self._place, role=self._role)
        while (work := self._queue.get()) is not None:
            try:
                self._do(client, work)
            finally:
                self._queue.task_done()
        client.close()

    def _do(self, client: Client, work: Snapshot | Message) -> None:
        try:
            if isinstance(work, Snapshot):
                task = partial(self._save, client, work)
            else:
                task = partial(client.call, work() if callable(work) else work)
            try:
                task()
            except UnavailableError:  # a daemon that came back learns of it on a new connection
                client.reconnect()
                task()
        except (UnavailableError, DeadlineError) as error:
            log_once(error)
            client.reconnect()
        except KVShareError as error:
            log_once(error)
        except Exception:  # a bug loses this prompt, not the thread that stores all others
            log.exception("kvshare: %s failed", type(work).__name__)
            log_once(InternalError("a save failed; the engine goes on"))
        finally:
            if isinstance(work, Snapshot):
                self._count(work, -1)
                work.raw.release()

    def _save(self, client: Client, snapshot: Snapshot) -> None:
        began, spec = time.monotonic(), snapshot.spec
        self._store(client, snapshot)
        if spec.trace is not None:
            took = time.monotonic() - began
            emit_span(spec.trace, "save", took, bytes=snapshot.nbytes, answer=bool(spec.extends))

    def _store(self, client: Client, snapshot: Snapshot) -> None:
        spec = snapshot.spec
        staged = client.stage_bytes(
            spec.tokens,
            spec.namespace,
            spec.reuse,
            spec.extends,
            greedy=spec.greedy,
            request=spec.request_id,
            source=spec.source,
        )
        if staged.known:
            return
        if list(staged.fresh) != spec.fresh:
            client.abandon(staged.id)  # a daemon of the release before wants all rows of an answer
            return
        client.commit(staged, self._blocks(staged, snapshot))

    def _blocks(self, staged: Staged, snapshot: Snapshot) -> Iterator[memoryview]:
        """The fresh rows, unpacked block by block so that they stay in the CPU's cache."""
        editor, row_bytes = Editor(self._layout, None), self._layout.row_bytes
        buffer = memoryview(bytearray(max(staged.sizes, default=0) * row_bytes))
        at = 0
        for rows in staged.sizes:
            block = buffer[: rows * row_bytes]
            positions = snapshot.positions[at : at + rows]
            snapshot.raw.rows(positions, out=editor.tensor(block, rows))
            yield block
            at += rows
