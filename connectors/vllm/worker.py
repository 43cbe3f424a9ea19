"""The worker side: writes reused rows before the forward, copies fresh rows after it.

One copy each way is on the critical path. Unpacking, hashing and storing happen in the saver's
thread, after the token is out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from kvshare_connectors.vllm.containment import contained, log_once
from kvshare_connectors.vllm.idle import Unserved
from kvshare_connectors.vllm.metadata import KVShareMetadata, LoadSpec, SaveSpec
from kvshare_connectors.vllm.paged_cache import PagedCache
from kvshare_connectors.vllm.resident import Resident
from kvshare_connectors.vllm.saver import Saver, Snapshot
from kvshare_connectors.vllm.timing import Seconds, emit_span, stopwatch

from kvshare_store.blocks.tiers.host.arena import Arenas, ArenaView
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.fetching import LeasedRows
from kvshare_store.daemon.network import place_of
from kvshare_store.daemon.protocol import Role
from kvshare_store.errors import DeadlineError, KVShareError, LeaseError, UnavailableError
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.plan.editor import Editor
from kvshare_store.plan.spans import Run, reused_of
from kvshare_store.tensors.rope import Rope

_FETCH_S = 5.0
"""A step waits no longer for rows of a daemon on another machine: they are computed."""
_TIMED = 4096
"""Durations kept until vLLM asks for them, which it does each step."""


class Worker:
    """One per worker process."""

    unserved: Unserved | None = None
    """Why nothing is loaded or stored; see `idle.py`."""

    def __init__(
        self, config: StoreConfig, cache: PagedCache, rope: Rope, role: Role = "engine"
    ) -> None:
        """`role`: with which it stores prompts."""
        self.cache = cache
        self.editor = Editor(cache.layout, rope, cache.device)
        self._config = config
        self.arenas = Arenas()
        self.fetching: Client | None = None
        """Where rows come from that are on another machine."""
        self._fetch_until = 0.0
        """How long this step waits for them (monotonic seconds)."""
        self.resident = Resident(config.device_bytes, cache.device, cache.layout)
        self.saver = Saver(config, cache.layout, role)
        self._failed_blocks: set[int] = set()
        """Not reported yet."""
        self._wrong_blocks: set[int] = set()
        """Blocks whose load failed, until the scheduler has heard of it."""
        self._watch = stopwatch(cache.device)
        self._warm = False
        """Whether it has prefilled before. The first one pays for what is made once."""
        self._load_seconds: deque[float] = deque(maxlen=_TIMED)
        """Written by the saver's thread, which waits for the device."""

    def save_answers(self, step: KVShareMetadata) -> None:
        """Copy the answers of ended requests before anything is written in this step: from now on
        other requests may own their blocks."""
        for spec in step.answers:
            self._save(spec)

    def step_begins(self, step: KVShareMetadata) -> None:
        """Start the clock for the prefill rate; drop failures that the scheduler has handled, and
        copies of what was purged."""
        self._wrong_blocks -= step.handled
        self.resident.purged(step.wiped)
        self._watch = stopwatch(self.cache.device)

    def load(self, step: KVShareMetadata) -> None:
        """Write every load of this step into the paged cache."""
        self._fetch_until = time.monotonic() + _FETCH_S
        for spec in step.loads:
            began, watch = time.time_ns(), stopwatch(self.cache.device)
            try:
                nbytes = self.load_one(spec)
            except Exception as error:  # noqa: BLE001 - the request is computed instead
                self._load_failed(spec, contained(error))
                continue
            self.saver.tell(self._loaded(spec, nbytes, began, watch.stop()))
        if step.loads:
            self._watch = stopwatch(self.cache.device)

    def load_one(self, spec: LoadSpec) -> int:
        """Write the rows of one load into the paged cache; returns their bytes."""
        if not self._wrong_blocks.isdisjoint(spec.block_ids):
            raise LeaseError("it shares paged blocks with a request whose load failed")
        plan = spec.plan
        used = [plan.blocks[index] for index in {span.block for span in plan.spans}]
        arena = self._leased(plan, used)
        for ref in used:
            arena.check(ref)
        edited = self.editor.edit(
            plan.spans,
            plan.blocks,
            lambda ref: arena.rows(ref.offset, ref.nbytes),
            self.resident.rows,
        )
        for ref in used:  # unchanged labels: what was copied is what was planned
            arena.check(ref)
        self.resident.used(arena, used)
        self.cache.write(edited.rows, _slots(edited.positions, spec.block_ids, self.cache))
        return edited.rows.numel() * edited.rows.element_size()

    def _leased(self, plan: ReusePlan, refs: Sequence[BlockRef]) -> LeasedRows:
        if not self._config.connect:
            return self._arena(plan.arena)
        if self.fetching is None:
            self.fetching = Client(place_of(self._config), role="engine")
        with contextlib.suppress(UnavailableError):
            self.fetching.look()  # a daemon that was restarted has closed this connection
        try:
            left = max(0.0, self._fetch_until - time.monotonic())
            return self.fetching.leased_rows(plan.lease, plan.arena, refs, left)
        except DeadlineError:
            self.fetching.reconnect()  # rows that still come would delay those of the next step
            raise

    def _arena(self, arena_id: str) -> ArenaView:
        """The daemon's shared memory, fetched with the first plan that names it.

        A restarted daemon has another one. That is once in a daemon's life, so it waits longer than
        for a plan: a daemon on a busy machine would lose the first requests their rows.
        """
        if arena_id not in self.arenas:
            with Client(self._config.home_path, timeout=_FETCH_S, role="engine") as client:
                welcome = client.greet()
                self.arenas.add(welcome.arena, os.dup(client.arena))
        return self.arenas.at(arena_id)

    def _load_failed(self, spec: LoadSpec, error: KVShareError) -> None:
        """Report the request's own blocks as invalid: the engine computes them. What its own cache
        has of the prompt it says when it begins again."""
        log_once(error)
        own = spec.own_blocks(self.cache.block_size)
        self._failed_blocks.update(own)
        self._wrong_blocks.update(own)
        outcome = Outcome(failed=f"load_{error.kind}", recomputed=spec.plan.tokens)
        self.saver.tell(protocol.Finish(spec.plan.lease, outcome))
        self.saver.tell(protocol.Failed(str(error.kind)))

    def after_forward(self, step: KVShareMetadata) -> None:
        """Copy the fresh rows of prompts that this step completed; the saver does the rest."""
        if step.prefilled and self._warm:
            seconds, tokens, model = self._watch.stop(), step.prefilled, step.model
            self.saver.tell(lambda: protocol.Observe(tokens, seconds(), model))
        self._warm |= step.prefilled > 0
        for spec in step.saves:
            self._save(spec)
        self._fill_resident()

    def _save(self, spec: SaveSpec) -> None:
        """Copy rows to be stored, unless they are of a failed load or were computed from such.

        A failure loses them for the store, not the request its answer.
        """
        if not self._wrong_blocks.isdisjoint(spec.block_ids):
            return
        try:
            self.saver.store(self.snapshot(spec))
        except Exception as error:  # noqa: BLE001 - see above
            self.saver.failed(contained(error))

    def _fill_resident(self) -> None:
        try:
            self.resident.fill()
        except Exception as error:  # noqa: BLE001 - the block is read from the arena next time
            self.saver.failed(contained(error))

    def snapshot(self, spec: SaveSpec) -> Snapshot:
        """Copy the paged blocks that hold the fresh rows of a prompt."""
        size = self.cache.block_size
        positions = _positions(spec.fresh)
        needed = torch.unique(positions // size)
        compact = torch.empty(int(needed[-1]) + 1, dtype=torch.int64)
        compact[needed] = torch.arange(len(needed))
        nbytes = len(needed) * size * self.cache.layout.row_bytes
        self.saver.check_room()
        raw = self.cache.snapshot([spec.block_ids[block] for block in needed.tolist()])
        offsets = compact[positions // size] * size + positions % size
        return Snapshot(spec, raw, offsets, nbytes)

    def take_failed_blocks(self) -> set[int]:
        """Paged blocks whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def _loaded(
        self, spec: LoadSpec, nbytes: int, began: int, seconds: Seconds
    ) -> Callable[[], protocol.Request]:
        """The report on a load, made once the device has finished it."""
        reused = reused_of(spec.plan.spans)

        def message() -> protocol.Request:
            took = seconds()
            self._load_seconds.append(took)
            if spec.trace is not None:
                emit_span(spec.trace, "load", took, began, bytes=nbytes)
            outcome = Outcome(
                reused.exact,
                reused.edited,
                spec.recomputed,
                nbytes,
                took,
                cached=spec.start,
                continued=reused.continued,
            )
            return protocol.Finish(spec.plan.lease, outcome)

        return message

    def take_load_seconds(self) -> list[float]:
        """Durations of the loads that were timed since the last call."""
        return [self._load_seconds.popleft() for _ in range(len(self._load_seconds))]

    def close(self) -> None:
        """Finish what is being saved, and let go of the connections."""
        self.saver.close()
        if self.fetching is not None:
            self.fetching.close()


def _positions(runs: list[Run]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _slots(positions: torch.Tensor, block_ids: list[int], cache: PagedCache) -> torch.Tensor:
    """Slot of each position: its block's id times the block size plus its offset."""
    blocks = torch.tensor(block_ids, dtype=torch.int64)
    size = cache.block_size
    return blocks[positions // size] * size + positions % size
