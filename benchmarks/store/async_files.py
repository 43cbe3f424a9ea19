"""The disk tier with blocking calls in threads, as it is, against the same tier with aiofiles."""

from __future__ import annotations

import asyncio
import os
import tempfile
from functools import partial
from pathlib import Path

import aiofiles
import aiofiles.os
import numpy as np

from benchmarks.data.kv_blocks import Named, described, random_blocks
from benchmarks.harness.concurrency import spent
from benchmarks.harness.page_cache import forget
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_range
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.cli.progress import track
from kvshare_store.errors import StorageError
from kvshare_store.tensors.frame import Block, decode_frame, encode_frame

BLOCKS, SHORT_BLOCKS = 64, 16
ROUNDS, SHORT_ROUNDS = 15, 3
MOST = 5
"""Limit in per cent of a rate or a latency: aiofiles is used if it costs no more."""

RATES = ("put GB/s", "get, cold GB/s", "get, warm GB/s")
"""With eight blocks at a time."""
LATENCIES = ("put alone ms", "get alone ms", "put alone, CPU ms", "get alone, CPU ms")
"""One block after the other, with warm files. CPU time excludes other processes."""


class AsyncDiskTier(DiskTier):
    """The same files, durable in the same order, by aiofiles in the same threads.

    What aiofiles has no call for (fsync) and what computes (framing, verifying) takes its turn in
    the threads.
    """

    async def put(self, name: str, block: Block) -> None:
        async with self._alone(name):
            await self._start(self._inventory.look)
            head, payload = await self._start(encode_frame, name, block, self._codec, self._key)
            nbytes = len(head) + len(payload)
            self._inventory.reserve(nbytes)
            written = None
            try:
                await self._write_async(self._inventory.path(name), head, payload)
                written = name
            finally:
                self._inventory.settle(nbytes, written)

    async def _write_async(self, path: str, *parts: bytes) -> None:
        threads = self._threads
        folder = str(Path(path).parent)
        if not await aiofiles.os.path.isdir(folder, executor=threads):
            await aiofiles.os.makedirs(folder, 0o700, exist_ok=True, executor=threads)
            await self._start(_sync, str(self._folder / "blocks"))
        unfinished = self._scratch.path()
        opened = aiofiles.open(unfinished, "xb", buffering=0, executor=threads)
        async with opened as file:
            for part in parts:
                if await file.write(part) != len(part):
                    raise StorageError("a write stopped early")
            await self._start(os.fsync, file.fileno())
        await aiofiles.os.replace(unfinished, path, executor=threads)
        await self._start(_sync, folder)

    async def get(self, name: str) -> Block:
        async with self._alone(name):
            path = self._inventory.path(name)
            async with aiofiles.open(path, "rb", buffering=0, executor=self._threads) as file:
                view = np.empty(os.fstat(file.fileno()).st_size, np.uint8).data
                at = 0
                while at < len(view) and (got := await file.readinto(view[at:])):
                    at += got
            block = await self._start(decode_frame, view[:at], name, self._key)
            self._inventory.add(name, at)
            return block


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Times = tuple[float, ...]
"""One round of one way: the rates, then the latencies."""

WAYS: dict[str, type[DiskTier]] = {"threads": DiskTier, "aiofiles": AsyncDiskTier}


async def round_of(kind: type[DiskTier], folder: Path, named: Named) -> Times:
    """Put, get cold, get warm, delete, then one block after the other."""
    size = sum(len(block.data) for _, block in named)
    tier = await kind.open(folder, 4 * size)
    at_once = tier.properties.max_concurrency
    puts = [partial(tier.put, name, block) for name, block in named]
    gets = [partial(tier.get, name) for name, _ in named]
    put = await spent(puts, at_once)
    forget(folder / "blocks")
    cold = await spent(gets, at_once)
    warm = await spent(gets, at_once)
    for name, _ in named:
        await tier.delete(name)
    put_alone = await spent(puts, 1)
    get_alone = await spent(gets, 1)
    for name, _ in named:
        await tier.delete(name)
    await tier.close()
    rates = (size / took.wall / 1e9 for took in (put, cold, warm))
    alone = (put_alone.wall, get_alone.wall, put_alone.cpu, get_alone.cpu)
    return (*rates, *(1e3 * seconds / len(named) for seconds in alone))


def measure(options: Options) -> Result:
    """Both ways by turns, on the same blocks and the same disk."""
    named = random_blocks(options.size(BLOCKS, SHORT_BLOCKS))
    rounds = SHORT_ROUNDS if options.short else ROUNDS
    times: dict[str, list[Times]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="kvshare-async-", dir=Path.cwd()) as place:
        for turn in track(range(rounds + 1), "Rounds"):
            for way in WAYS if turn % 2 else reversed(WAYS):
                folder = Path(place) / way
                times[way].append(asyncio.run(round_of(WAYS[way], folder, named)))
    measured = {way: times[way][1:] for way in WAYS}  # the first warms up
    rows = [_row(index, what, measured) for index, what in enumerate(RATES + LATENCIES)]
    costs = [float(row[-2]) for row in rows]  # type: ignore[arg-type]
    return Result(
        name="async-files",
        title="Block files: plain calls in threads, and aiofiles",
        n={"blocks": len(named), "rounds": rounds},
        seed=0,
        model=described(named),
        noise_floor="the spread over rounds, in the table",
        columns=["what", "threads", "spread", "aiofiles", "spread", "aiofiles costs %", "spread"],
        rows=rows,
        notes=[_verdict(max(costs)), *_NOTES],
    )


def _verdict(cost: float) -> str:
    """What the design's rule makes of the numbers."""
    chosen = "aiofiles is used" if cost <= MOST else "plain calls stay"
    return (
        f"The tier would use aiofiles if that cost at most {MOST} % of every rate and latency. It "
        f"costs up to {cost:.0f} %: {chosen}."
    )


_NOTES = [
    "Both ways by turns, first one and then the other; medians over rounds. A cost is of two "
    "numbers of the same round: what aiofiles takes longer, positive where it is slower.",
    "The same files in the same order, each fsynced, renamed, its folder fsynced, and verified "
    "when read, in the same nine threads. Plain calls take one turn in a thread for each block. "
    "Through aiofiles opening, each write or read, renaming and closing take a turn each, and so "
    "do fsync and framing, which aiofiles has no calls for.",
]


def _row(index: int, what: str, measured: dict[str, list[Times]]) -> list[Cell]:
    cells: list[Cell] = [what]
    for way in WAYS:
        cells += median_and_range([times[index] for times in measured[way]])
    pairs = zip(measured["threads"], measured["aiofiles"], strict=True)
    # rates fall and latencies rise where something takes longer
    costs = [
        100 * ((ours[index] / theirs[index]) ** (1 if index < len(RATES) else -1) - 1)
        for ours, theirs in pairs
    ]
    return [*cells, *median_and_range(costs, 1)]
