"""Snapshots on their way from a GPU. A made-up stream that copies only when it is waited for stands
in for a slow second stream.

`tests/gpu/check.py` does the same with real streams.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvshare_connectors.vllm.paged_cache import PagedCache
from kvshare_connectors.vllm.paged_formats import LogicalFormat
from kvshare_connectors.vllm.snapshots import SnapshotRing
from torch import Tensor

from kvshare_store.errors import NoSpaceError
from tests.support.paged import rows_at

LAYERS, HEADS, TOKENS, HEAD_DIM, BLOCKS = 3, 2, 16, 8, 40
BLOCK_BYTES = LAYERS * HEADS * TOKENS * 2 * HEAD_DIM * 4
SLOTS = 4
CPU = torch.device("cpu")


class Job:
    """A copy that the side stream has not yet carried out."""

    def __init__(self, side: LateSide, source: Tensor, target: Tensor) -> None:
        self.done = False
        self._side, self._source, self._target = side, source, target

    def run(self) -> None:
        with torch.inference_mode():  # a stream knows nothing of modes
            self._target.copy_(self._source)
        self.done = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._side.run_until(self)


class LateSide:
    """Does nothing until it is waited for, then everything in order, as a real stream does."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.held = 0

    def copy(self, source: Tensor, target: Tensor) -> Job:
        self.jobs.append(Job(self, source, target))
        return self.jobs[-1]

    def hold(self, copied: Any) -> None:
        self.held += 1
        copied.synchronize()

    def run_until(self, last: Job) -> None:
        while not last.done:
            next(job for job in self.jobs if not job.done).run()

    def catch_up(self) -> None:
        self.run_until(self.jobs[-1])


@pytest.fixture
def side() -> LateSide:
    return LateSide()


@pytest.fixture
def ring(side: LateSide) -> SnapshotRing:
    return SnapshotRing(CPU, side, slots=SLOTS, slot_bytes=2 * BLOCK_BYTES)


@pytest.fixture
def cache(ring: SnapshotRing) -> PagedCache:
    return paged(ring)


def paged(ring: SnapshotRing) -> PagedCache:
    layers = [
        SimpleNamespace(kv_cache=torch.randn(BLOCKS, HEADS, TOKENS, 2 * HEAD_DIM))
        for _ in range(LAYERS)
    ]
    return PagedCache(layers, LogicalFormat(), ring=ring)


def tokens_of(*blocks: int) -> Tensor:
    return torch.cat([torch.arange(TOKENS) + block * TOKENS for block in blocks])


def expected(cache: PagedCache, *blocks: int) -> Tensor:
    """Canonical rows of blocks, read without the ring buffer."""
    plain = PagedCache(cache.layers, LogicalFormat())
    return rows_at(plain, tokens_of(*blocks))


def wipe(cache: PagedCache) -> None:
    """The engine gives the blocks to other requests."""
    for layer in cache.layers:
        layer.kv_cache.zero_()


def test_whoever_reads_rows_waits_for_the_copy(cache: PagedCache, side: LateSide) -> None:
    rows = expected(cache, 7, 3, 12)
    raw = cache.snapshot([7, 3, 12])
    wipe(cache)
    assert not any(job.done for job in side.jobs)  # taking a snapshot waited for nothing
    assert torch.equal(raw.rows(torch.arange(3 * TOKENS)), rows)


def test_device_memory_is_bounded_and_what_does_not_fit_is_dropped(
    cache: PagedCache, ring: SnapshotRing, side: LateSide
) -> None:
    kept = {block: expected(cache, block) for block in range(SLOTS)}
    taken = {block: cache.snapshot([block]) for block in range(SLOTS)}
    with pytest.raises(NoSpaceError):
        cache.snapshot([9])
    wipe(cache)
    for block, raw in taken.items():
        assert torch.equal(raw.rows(torch.arange(TOKENS)), kept[block])
    for block in range(SLOTS):  # the ring is free again
        cache.snapshot([block])
    with pytest.raises(NoSpaceError):
        cache.snapshot([9])


def test_a_prompt_larger_than_the_ring_passes_through_it(cache: PagedCache, side: LateSide) -> None:
    blocks = list(range(30, 5, -1))
    rows = expected(cache, *blocks)
    raw = cache.snapshot(blocks)
    wipe(cache)
    assert side.held > 0  # the engine's stream waited for copies of its own, its thread did not
    assert torch.equal(raw.rows(torch.arange(len(blocks) * TOKENS)), rows)


def test_a_large_prompt_does_not_wait_for_those_of_others(cache: PagedCache) -> None:
    cache.snapshot([0])
    with pytest.raises(NoSpaceError):
        cache.snapshot(range(2 * SLOTS))


def test_a_dropped_snapshot_gives_its_host_memory_back(cache: PagedCache, side: LateSide) -> None:
    waiting = [cache.snapshot([block]) for block in range(SLOTS)]
    with pytest.raises(NoSpaceError):
        cache.snapshot([9])
    assert cache.spare.nbytes > 0
    side.catch_up()
    for raw in waiting:
        raw.release()


def test_a_slot_holds_at_least_one_block(side: LateSide) -> None:
    cache = paged(SnapshotRing(CPU, side, slots=2, slot_bytes=BLOCK_BYTES // 3))
    rows = expected(cache, 4, 2)
    raw = cache.snapshot([4, 2])
    wipe(cache)
    assert torch.equal(raw.rows(torch.arange(2 * TOKENS)), rows)


def test_a_ring_made_in_inference_mode_serves_outside_of_it(cache: PagedCache) -> None:
    with torch.inference_mode():
        first = cache.snapshot([1])
    rows = expected(cache, 2)
    second = cache.snapshot([2])
    assert torch.equal(second.rows(torch.arange(TOKENS)), rows)
    first.release()


def test_nothing_is_copied_for_no_blocks(cache: PagedCache, side: LateSide) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert cache.snapshot([]).rows(none).shape == cache.layout.shape(0)
    assert not side.jobs
