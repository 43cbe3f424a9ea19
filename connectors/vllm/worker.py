"""The worker side: writes edited rows before the forward, takes fresh rows after it.

On the critical path there is one copy each way. Unpacking, hashing and storing happen in a thread
of their own, after the token is out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from typing import NamedTuple

import torch
from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
from kvshare_connectors.vllm.paged_cache import PagedCache
from kvshare_connectors.vllm.raw_blocks import RawBlocks
from kvshare_connectors.vllm.resident import Resident

from kvshare_store.blocks.arena import Arena, Arenas
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.editor import Editor
from kvshare_store.errors import (
    DeadlineError,
    ErrorKind,
    InternalError,
    KVShareError,
    LeaseError,
    NoSpaceError,
    UnavailableError,
)
from kvshare_store.plan import Outcome, Run
from kvshare_store.staging import Staged
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

    def __init__(self, config: StoreConfig, cache: PagedCache, rope: Rope) -> None:
        self._cache = cache
        self._editor = Editor(cache.layout, rope, cache.device)
        self._arenas = Arenas()
        self._resident = Resident(config.device_bytes, cache.device, cache.layout)
        self.saver = Saver(config, cache)
        self._failed_blocks: set[int] = set()
        """Not yet reported."""
        self._wrong_blocks: set[int] = set()
        """Blocks without the rows that the scheduler believed in when it made this step."""
        self._started = 0.0

    def step_begins(self, step: KVShareMetadata) -> None:
        """Remember when, for the prefill rate, and forget failures that the scheduler has met."""
        self._wrong_blocks -= step.handled
        self._started = time.perf_counter()

    def load(self, step: KVShareMetadata) -> None:
        """Write every load of this step into the paged cache."""
        for spec in step.loads:
            start = time.perf_counter()
            try:
                nbytes = self._load(spec)
            except KVShareError as error:
                self._load_failed(spec, error)
                continue
            edited = sum(span.length for span in spec.spans) - spec.exact
            seconds = time.perf_counter() - start
            outcome = Outcome(spec.exact, edited, spec.recomputed, nbytes, seconds)
            self.saver.tell(protocol.Finish(spec.lease, outcome))
        if step.loads:
            self._started = time.perf_counter()

    def _load(self, spec: LoadSpec) -> int:
        if not self._wrong_blocks.isdisjoint(spec.block_ids):
            raise LeaseError("it shares paged blocks with a request whose load failed")
        arena: Arena = self._arenas.at(spec.arena)
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

    def _load_failed(self, spec: LoadSpec, error: KVShareError) -> None:
        """Everything from the first block that is the request's own is computed by the engine."""
        _log_once(error)
        first = spec.start // self._cache.block_size
        self._failed_blocks.update(spec.block_ids[first:])
        self._wrong_blocks.update(spec.block_ids[first:])
        recomputed = spec.recomputed + sum(span.length for span in spec.spans)
        outcome = Outcome(failed=f"load_{error.kind}", recomputed=recomputed)
        self.saver.tell(protocol.Finish(spec.lease, outcome))
        self.saver.tell(protocol.Failed(str(error.kind)))

    def after_forward(self, step: KVShareMetadata) -> None:
        """Copy the fresh rows of prompts that are complete now, and hand the rest to the saver."""
        self._resident.fill()
        if step.prefilled:
            seconds = time.perf_counter() - self._started
            self.saver.tell(protocol.Observe(step.prefilled, seconds, step.model))
        for spec in step.saves:
            # rows of a failed load are not to be stored, nor what was computed from them
            if self._wrong_blocks.isdisjoint(spec.block_ids):
                self.saver.store(self._snapshot(spec))

    def _snapshot(self, spec: SaveSpec) -> Snapshot:
        size = self._cache.block_size
        positions = _positions(spec.fresh)
        needed = torch.unique(positions // size)
        compact = torch.empty(int(needed[-1]) + 1, dtype=torch.int64)
        compact[needed] = torch.arange(len(needed))
        raw = self._cache.snapshot([spec.block_ids[block] for block in needed.tolist()])
        offsets = compact[positions // size] * size + positions % size
        nbytes = len(needed) * size * self._cache.layout.row_bytes
        return Snapshot(spec, raw, offsets, nbytes)

    def take_failed_blocks(self) -> set[int]:
        """Paged blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        """Finish what is being saved."""
        self.saver.close()
        self._arenas.close()


class Saver:
    """Everything the worker tells the daemon, in one thread with one client, in order."""

    def __init__(self, config: StoreConfig, cache: PagedCache) -> None:
        self._config = config
        self._cache = cache
        self._queue: queue.Queue[Snapshot | protocol.Request | None] = queue.Queue()
        self._waiting_bytes = 0
        self._counting = threading.Lock()
        self._thread = Supervised("kvshare-saver", self._run, Health())

    def tell(self, message: protocol.Request) -> None:
        """Queue a message that nobody waits for."""
        self._queue.put(message)

    def store(self, snapshot: Snapshot) -> None:
        """Queue a prompt, or drop it: while the daemon is slow or away, memory must not fill up."""
        if self._waiting_bytes > self._config.host_bytes // 2:
            snapshot.raw.release()
            _log_once(NoSpaceError("prompts wait to be stored and fill half of host_bytes"))
            self.tell(protocol.Failed(str(ErrorKind.NO_SPACE)))
            return
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

    def _do(self, client: Client, work: Snapshot | protocol.Request) -> None:
        try:
            if isinstance(work, Snapshot):
                self._save(client, work)
            else:
                client.call(work)
        except (UnavailableError, DeadlineError) as error:
            _log_once(error)
            client.reconnect()
        except KVShareError as error:
            _log_once(error)
        except Exception:  # a bug loses this prompt, not the thread that stores all others
            log.exception("kvshare: %s failed", type(work).__name__)
            _log_once(InternalError("a save failed; the engine goes on"))
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
        try:
            self._fill(client, staged, snapshot)
        except KVShareError:
            client.abandon(staged.id)
            raise
        client.commit(staged.id)

    def _fill(self, client: Client, staged: Staged, snapshot: Snapshot) -> None:
        """Unpack block by block, so that the unpacked rows stay in the processor's cache."""
        editor = Editor(self._cache.layout, None)
        # mapped now: a daemon that restarts meanwhile gives the same offsets to others
        buffers = [client.slot(staged, slot) for slot in staged.slots]
        at = 0
        for slot, buffer in zip(staged.slots, buffers, strict=True):
            positions = snapshot.positions[at : at + slot.rows]
            stored = editor.tensor(buffer, slot.rows)
            if self._cache.device.type == "cpu":
                snapshot.raw.rows(positions, out=stored)
            else:
                stored.copy_(snapshot.raw.rows(positions))
            at += slot.rows


def _positions(runs: list[Run]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _slots(positions: torch.Tensor, block_ids: list[int], cache: PagedCache) -> torch.Tensor:
    """Slot of each position: its block's id times the block size plus its offset."""
    blocks = torch.tensor(block_ids, dtype=torch.int64)
    size = cache.block_size
    return blocks[positions // size] * size + positions % size


_logged: Counter[str] = Counter()


def _log_once(error: KVShareError) -> None:
    """Every kind of failure is logged once per process; the daemon counts them all."""
    _logged[error.kind] += 1
    if _logged[error.kind] == 1:
        log.warning("kvshare: %s (counted from now on, not logged)", error)
