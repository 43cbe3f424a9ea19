"""Snapshots and times while the GPU is behind the thread that submits its work."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from kvshare_connectors.vllm.paged_cache import PagedCache
from kvshare_connectors.vllm.raw_blocks import RawBlocks
from kvshare_connectors.vllm.timing import stopwatch
from torch import Tensor

from kvshare_store.errors import NoSpaceError
from tests.gpu.model import DEVICE, paged_cache

ROUNDS = 200
BLOCK_IDS = list(range(40, 296))
"""128 MiB of cache for the race."""
RING_BYTES = 256 << 20
Take = Callable[[PagedCache], RawBlocks]


def race() -> dict[str, Any]:
    """Rows that graph replays on a private stream write, read by another thread.

    `as_before`: the snapshot stays on the device and the reader uses its own stream. `no_event`:
    today's way, but without waiting for the copy.
    """
    wrong = {
        "with_event": rounds(lambda cache: cache.snapshot(BLOCK_IDS)),
        "no_event": rounds(without_event),
        "as_before": rounds(on_the_device),
    }
    return {"ok": wrong["with_event"] == 0, "rounds": ROUNDS, "wrong_rounds": wrong}


def without_event(cache: PagedCache) -> RawBlocks:
    raw = cache.snapshot(BLOCK_IDS)
    raw._copied = None
    return raw


def on_the_device(cache: PagedCache) -> RawBlocks:
    """How a snapshot was taken before: a device buffer, written on the caller's stream."""
    ids = torch.tensor(BLOCK_IDS, device=DEVICE)
    shape = (len(cache.layers), len(BLOCK_IDS), *cache.layers[0].kv_cache.shape[1:])
    copies = torch.empty(shape, dtype=cache.layers[0].kv_cache.dtype, device=DEVICE)
    cache._copy_blocks(ids, copies)
    return RawBlocks(copies, cache._format, cache.layout, copies, cache.spare)


def rounds(take: Take) -> int:
    """Steps of an engine with a concurrent reader; returns in how many the reader found wrong
    rows."""
    cache, private = paged_cache(blocks=300), torch.cuda.Stream()
    value = torch.zeros((), dtype=torch.bfloat16, device=DEVICE)
    waiting: queue.Queue[tuple[int, RawBlocks] | None] = queue.Queue()
    wrong: list[int] = []
    reader = threading.Thread(target=read, args=(waiting, wrong))
    graph = step_of(cache, value, private)
    reader.start()
    with torch.cuda.stream(private):
        for number in range(1, ROUNDS + 1):
            value.fill_(number)
            graph.replay()
            waiting.put((number, taken(take, cache)))
            for layer in cache.layers:  # the next step gives the blocks to other requests
                layer.kv_cache.fill_(-1)
            while waiting.qsize() > 4:
                time.sleep(1e-4)
    waiting.put(None)
    reader.join()
    torch.cuda.synchronize()
    return len(wrong)


def taken(take: Take, cache: PagedCache) -> RawBlocks:
    """Take a snapshot, once there is room for one."""
    while True:
        try:
            return take(cache)
        except NoSpaceError:
            time.sleep(1e-4)


def step_of(cache: PagedCache, value: Tensor, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A step of some milliseconds. At its end every row of the cache is `value`."""
    weights = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(16):
            weights @ weights
        for layer in cache.layers:
            layer.kv_cache.copy_(value.expand_as(layer.kv_cache))

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        compute()
    return graph


def read(waiting: Any, wrong: list[int]) -> None:
    """Unpack snapshots as the saver does, in a thread with streams of its own."""
    while (found := waiting.get()) is not None:
        number, raw = found
        first, last = torch.arange(16), torch.arange(16) + (len(BLOCK_IDS) - 1) * 16
        rows = raw.rows(torch.cat([first, last])).cpu()
        expected = torch.tensor(number, dtype=torch.bfloat16)
        if not bool((rows == expected).all()):
            wrong.append(number)
        if raw.buffer.is_cpu:
            raw.release()


def memory() -> dict[str, Any]:
    """Device memory of a burst of snapshots, and a prompt larger than the ring."""
    cache = paged_cache(blocks=3200, layers=16)
    forward = matmuls(200)
    forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward()  # so that no snapshot is copied before the last is requested
    burst = snapshots_at_once(cache, [list(range(i * 32, i * 32 + 32)) for i in range(100)])
    large, took = timed(lambda: cache.snapshot(range(1024)))
    rows, waited = timed(lambda: large.rows(torch.arange(64)))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    block_bytes = cache.layout.row_bytes * 16
    return {
        "ok": peak <= RING_BYTES + (8 << 20) and rows.shape[2] == 64 and burst["right"],
        "peak_device_bytes_beyond_the_cache": peak,
        "burst": burst,
        "large_prompt": {
            "bytes": 1024 * block_bytes,
            "thread_s": took,
            "until_in_host_memory_s": took + waited,
        },
    }


def snapshots_at_once(cache: PagedCache, prompts: list[list[int]]) -> dict[str, Any]:
    """Take them without waiting for any; every one that was kept must be right."""
    kept: dict[int, RawBlocks] = {}
    seconds = []
    for index, ids in enumerate(prompts):
        began = time.perf_counter()
        try:
            kept[index] = cache.snapshot(ids)
        except NoSpaceError:
            continue
        finally:
            seconds.append(time.perf_counter() - began)
    right = all(
        torch.equal(raw.rows(torch.arange(512)), plain(cache, prompts[index]))
        for index, raw in kept.items()
    )
    for raw in kept.values():
        raw.release()
    ordered = sorted(seconds)
    return {
        "taken": len(kept),
        "dropped": len(prompts) - len(kept),
        "right": right and bool(kept),
        "bytes_each": len(prompts[0]) * 16 * cache.layout.row_bytes,
        "thread_s_median": ordered[len(ordered) // 2],
        "thread_s_largest": ordered[-1],
    }


def plain(cache: PagedCache, ids: list[int]) -> Tensor:
    """Canonical rows of blocks by plain indexing, to compare with."""
    at = torch.tensor(ids, device=DEVICE)
    layers = [layer.kv_cache[at].transpose(1, 2).flatten(0, 1).cpu() for layer in cache.layers]
    return torch.stack([torch.stack(layer.chunk(2, dim=-1)) for layer in layers])


def prefill_time() -> dict[str, Any]:
    """Seconds of a forward pass: by the clock of the thread that launches it, by CUDA events, and
    the true time."""
    forward = matmuls(60)
    forward()
    torch.cuda.synchronize()
    watch = stopwatch(DEVICE)
    _, launch = timed(forward)
    seconds, stop = timed(watch.stop)
    _, rest = timed(torch.cuda.synchronize)
    truth, events = launch + stop + rest, seconds()
    return {
        "ok": abs(events - truth) < 0.1 * truth and stop < 0.1 * truth,
        "launch_s": launch,
        "events_s": events,
        "truth_s": truth,
        "stopping_the_watch_s": stop,
    }


def matmuls(count: int) -> Callable[[], None]:
    """Work of some milliseconds each, launched in microseconds."""
    weights = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    result = torch.empty_like(weights)

    def forward() -> None:
        for _ in range(count):
            torch.mm(weights, weights, out=result)

    return forward


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and how long the thread was busy with it."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began
