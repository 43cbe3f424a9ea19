"""The worker side: writes edited rows before the forward, takes fresh rows after it.

On the critical path there is one copy each way. Unpacking, hashing and storing happen in a thread
of their own, after the token is out.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from kvshare_connectors.vllm.containment import contained, log_once
from kvshare_connectors.vllm.idle import Unserved
from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
from kvshare_connectors.vllm.paged_cache import PagedCache
from kvshare_connectors.vllm.raw_blocks import RawBlocks
from kvshare_connectors.vllm.resident import Resident
from kvshare_connectors.vllm.timing import Seconds, stopwatch

from kvshare_store.blocks.tiers.host.arena import Arenas, ArenaView
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.editor import Editor
from kvshare_store.errors import (
    DeadlineError,
    InternalError,
    KVShareError,
    LeaseError,
    NoSpaceError,
    UnavailableError,
)
from kvshare_store.plan import Outcome, Run
from kvshare_store.save.staging import Staged
from kvshare_store.tensors.rope import Rope
from kvshare_store.threads import Health, Supervised

log = logging.getLogger("kvshare")


class Snapshot(NamedTuple):
    """Raw paged blocks of a complete prompt, and what to make of them."""

    spec: SaveSpec
    raw: RawBlocks
    positions: torch.Tensor
    """int64: offsets of the fresh rows inside `raw`."""
    nbytes: int


class Worker:
    """One per worker process."""

    unserved: Unserved | None = None
    """Why nothing is loaded or stored; see `idle.py`."""

    def __init__(self, config: StoreConfig, cache: PagedCache, rope: Rope) -> None:
        self._cache = cache
        self._editor = Editor(cache.layout, rope, cache.device)
        self._config = config
        self._arenas = Arenas()
        self._resident = Resident(config.device_bytes, cache.device, cache.layout)
        self.saver = Saver(config, cache)
        self._failed_blocks: set[int] = set()
        """Not yet reported."""
        self._wrong_blocks: set[int] = set()
        """Blocks without the rows that the scheduler believed in when it made this step."""
        self._watch = stopwatch(cache.device)

    def step_begins(self, step: KVShareMetadata) -> None:
        """Remember when, for the prefill rate, and forget failures that the scheduler has met."""
        self._wrong_blocks -= step.handled
        self._watch = stopwatch(self._cache.device)

    def load(self, step: KVShareMetadata) -> None:
        """Write every load of this step into the paged cache."""
        for spec in step.loads:
            watch = stopwatch(self._cache.device)
            try:
                nbytes = self._load(spec)
            except Exception as error:  # noqa: BLE001 - whatever it is, the request is computed
                self._load_failed(spec, contained(error))
                continue
            self.saver.tell(_loaded(spec, nbytes, watch.stop()))
        if step.loads:
            self._watch = stopwatch(self._cache.device)

    def _load(self, spec: LoadSpec) -> int:
        if not self._wrong_blocks.isdisjoint(spec.block_ids):
            raise LeaseError("it shares paged blocks with a request whose load failed")
        arena = self._arena(spec.arena)
        used = {span.block for span in spec.spans}
        for index in used:
            arena.check(spec.blocks[index])
        edited = self._editor.edit(
            spec.spans,
            spec.blocks,
            lambda ref: arena.rows(ref.offset, ref.nbytes),
            self._resident.rows,
        )
        for index in used:  # still the same blocks, so what was copied is what was planned
            arena.check(spec.blocks[index])
        self._resident.used(arena, [spec.blocks[index] for index in used])
        self._cache.write(edited.rows, _slots(edited.positions, spec.block_ids, self._cache))
        return edited.rows.numel() * edited.rows.element_size()

    def _arena(self, arena_id: str) -> ArenaView:
        """The daemon's shared memory, asked for when its first plan comes: one that was restarted
        has another. Waits no longer than a plan may take."""
        if arena_id not in self._arenas:
            patience = self._config.plan_deadline_ms / 1e3
            with Client(self._config.home_path, timeout=patience) as client:
                welcome = client.greet()
                self._arenas.add(welcome.arena, os.dup(client.arena))
        return self._arenas.at(arena_id)

    def _load_failed(self, spec: LoadSpec, error: KVShareError) -> None:
        """Everything from the first block that is the request's own is computed by the engine."""
        log_once(error)
        own = spec.own_blocks(self._cache.block_size)
        self._failed_blocks.update(own)
        self._wrong_blocks.update(own)
        recomputed = spec.recomputed + sum(span.length for span in spec.spans)
        failed = f"load_{error.kind}"
        outcome = Outcome(failed=failed, recomputed=recomputed, cached=spec.start)
        self.saver.tell(protocol.Finish(spec.lease, outcome))
        self.saver.tell(protocol.Failed(str(error.kind)))

    def after_forward(self, step: KVShareMetadata) -> None:
        """Copy the fresh rows of prompts that are complete now, and hand the rest to the saver."""
        if step.prefilled:
            seconds, tokens, model = self._watch.stop(), step.prefilled, step.model
            self.saver.tell(lambda: protocol.Observe(tokens, seconds(), model))
        for spec in step.saves:
            # rows of a failed load are not to be stored, nor what was computed from them
            if self._wrong_blocks.isdisjoint(spec.block_ids):
                self._save(spec)
        self._fill_resident()

    def _save(self, spec: SaveSpec) -> None:
        """Take a prompt's rows, or drop them: its answer does not depend on it."""
        try:
            self.saver.store(self._snapshot(spec))
        except Exception as error:  # noqa: BLE001 - see above
            self.saver.failed(contained(error))

    def _fill_resident(self) -> None:
        try:
            self._resident.fill()
        except Exception as error:  # noqa: BLE001 - a block that is not kept is read again
            self.saver.failed(contained(error))

    def _snapshot(self, spec: SaveSpec) -> Snapshot:
        size = self._cache.block_size
        positions = _positions(spec.fresh)
        needed = torch.unique(positions // size)
        compact = torch.empty(int(needed[-1]) + 1, dtype=torch.int64)
        compact[needed] = torch.arange(len(needed))
        nbytes = len(needed) * size * self._cache.layout.row_bytes
        self.saver.check_room()
        raw = self._cache.snapshot([spec.block_ids[block] for block in needed.tolist()])
        offsets = compact[positions // size] * size + positions % size
        return Snapshot(spec, raw, offsets, nbytes)

    def take_failed_blocks(self) -> set[int]:
        """Paged blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        """Finish what is being saved."""
        self.saver.close()


def _loaded(spec: LoadSpec, nbytes: int, seconds: Seconds) -> Callable[[], protocol.Request]:
    """What to tell of a load, once the device has done it."""
    edited = sum(span.length for span in spec.spans) - spec.exact

    def message() -> protocol.Request:
        outcome = Outcome(spec.exact, edited, spec.recomputed, nbytes, seconds(), cached=spec.start)
        return protocol.Finish(spec.lease, outcome)

    return message


Message = protocol.Request | Callable[[], protocol.Request]
"""A request for the daemon, or what makes it when its turn comes and may wait for a device."""


class Saver:
    """Everything the worker tells the daemon, in one thread with one client, in order."""

    def __init__(self, config: StoreConfig, cache: PagedCache) -> None:
        self._config = config
        self._cache = cache
        self._queue: queue.Queue[Snapshot | Message | None] = queue.Queue()
        self._waiting_bytes = 0
        self._counting = threading.Lock()
        self._thread = Supervised("kvshare-saver", self._run, Health())

    def tell(self, message: Message) -> None:
        """Queue a message that nobody waits for."""
        self._queue.put(message)

    def failed(self, error: KVShareError) -> None:
        """Log and count what the engine goes on without."""
        log_once(error)
        self.tell(protocol.Failed(str(error.kind)))

    def check_room(self) -> None:
        """Raise `NoSpaceError` while so much waits that another prompt must be dropped.

        While the daemon is slow or away, memory must not fill up.
        """
        if self._waiting_bytes > self._config.host_bytes // 2:
            raise NoSpaceError("prompts wait to be stored and fill half of host_bytes")

    def store(self, snapshot: Snapshot) -> None:
        """Queue a prompt."""
        self._count(snapshot, 1)
        self._queue.put(snapshot)

    def _count(self, snapshot: Snapshot, sign: int) -> None:
        with self._counting:
            self._waiting_bytes += sign * snapshot.nbytes

    def wait(self) -> None:
        """Return once everything queued so far has been told to the daemon."""
        self._queue.join()

    def close(self) -> None:
        """Work off the queue and stop."""
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        client = Client(self._config.home_path)
        while (work := self._queue.get()) is not None:
            try:
                self._do(client, work)
            finally:
                self._queue.task_done()
        client.close()

    def _do(self, client: Client, work: Snapshot | Message) -> None:
        try:
            if isinstance(work, Snapshot):
                self._save(client, work)
            else:
                client.call(work() if callable(work) else work)
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
        spec = snapshot.spec
        tokens = spec.tokens
        staged = client.stage_bytes(tokens, spec.namespace, spec.reuse)
        if staged.known:
            return
        client.commit(staged, self._blocks(staged, snapshot))

    def _blocks(self, staged: Staged, snapshot: Snapshot) -> Iterator[memoryview]:
        """The fresh rows, unpacked block by block, so that they stay in the processor's cache."""
        editor, row_bytes = Editor(self._cache.layout, None), self._cache.layout.row_bytes
        buffer = memoryview(bytearray(max(staged.sizes, default=0) * row_bytes))
        at = 0
        for rows in staged.sizes:
            block = buffer[: rows * row_bytes]
            positions = snapshot.positions[at : at + rows]
            snapshot.raw.rows(positions, out=editor.tensor(block, rows))
            yield block
            at += rows


def _positions(runs: list[Run]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _slots(positions: torch.Tensor, block_ids: list[int], cache: PagedCache) -> torch.Tensor:
    """Slot of each position: its block's id times the block size plus its offset."""
    blocks = torch.tensor(block_ids, dtype=torch.int64)
    size = cache.block_size
    return blocks[positions // size] * size + positions % size
