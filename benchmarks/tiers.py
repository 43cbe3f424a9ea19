"""Put and get of every tier, beside what the medium gives without us, in the same run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.progress import track

from benchmarks.pages import forget
from benchmarks.result import Cell, Options, Result
from kvshare_store.blocks.remotes import open_remote
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.host.arena import Arena, slot_bytes
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.tensors.frame import Block, block_name
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.servers import (
    MooncakeClient,
    MooncakeMaster,
    RedisServer,
    S3Server,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
"""SmolLM2-135M: 1.47 MB a block of 64 rows."""
ROWS = 64
BLOCKS, SHORT_BLOCKS = 64, 16
ROUNDS, SHORT_ROUNDS = 7, 2
TIMEOUT_S = 30.0
_MIB = 1 << 20

Named = Sequence[tuple[str, Block]]
Round = Callable[[], tuple[float, float]]
"""One round: seconds of putting all blocks and of getting them."""


class Arm(NamedTuple):
    """A tier or what it is compared with."""

    name: str
    beside: str
    """The arm that it is compared with."""
    run: Round


def make_blocks(count: int) -> Named:
    """Random rows: nothing compresses them."""
    chance = np.random.default_rng(0)
    blocks = [Block("0" * 64, LAYOUT, chance.bytes(ROWS * LAYOUT.row_bytes)) for _ in range(count)]
    return [(block_name(block), block) for block in blocks]


# --- tiers ----------------------------------------------------------------------------------------


async def _each(calls: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> float:
    """Seconds of all calls, so many at a time."""
    slots = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with slots:
            await call()

    start = perf_counter()
    await asyncio.gather(*(one(call) for call in calls))
    return perf_counter() - start


def through(
    make: Callable[[], Awaitable[Tier]], named: Named, between: Callable[[], None]
) -> Round:
    """Put, get and delete every block, as many at a time as the tier is worth."""

    async def conduct() -> tuple[float, float]:
        tier = await make()
        at_once = tier.properties.max_concurrency
        put = await _each([lambda n=n, b=b: tier.put(n, b) for n, b in named], at_once)  # type: ignore[misc]
        between()
        got = await _each([lambda n=n: tier.get(n) for n, _ in named], at_once)  # type: ignore[misc]
        for name, _ in named:
            await tier.delete(name)
        await tier.close()
        return put, got

    return lambda: asyncio.run(conduct())


def memcpy(named: Named) -> Round:
    """One thread copies the same bytes from one place in memory to another, both ways."""
    source = [np.frombuffer(block.data, np.uint8) for _, block in named]
    target = [np.zeros(len(block.data), np.uint8) for _, block in named]

    def run() -> tuple[float, float]:
        times = []
        for _ in range(2):
            start = perf_counter()
            for ours, theirs in zip(target, source, strict=True):
                np.copyto(ours, theirs)
            times.append(perf_counter() - start)
        return times[0], times[1]

    return run


def fio(folder: Path, named: Named) -> Round:
    """`fio`: eight jobs, files of a block's size, fsync after each; then they are read, cold."""
    size = len(named[0][1].data) // 4096 * 4096

    def job(kind: str, *more: str) -> float:
        line = ["fio", "--name=kvshare", f"--directory={folder}", f"--rw={kind}", f"--bs={size}",
                f"--filesize={size}", f"--nrfiles={len(named) // 8}", "--numjobs=8",
                "--openfiles=1", "--file_service_type=sequential", "--ioengine=psync",
                "--group_reporting", "--output-format=json", *more]  # fmt: skip
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][kind]
        return float(found["io_bytes"]) / float(found["bw_bytes"])

    def run() -> tuple[float, float]:
        written = job("write", "--create_on_open=1", "--end_fsync=1", "--overwrite=0")
        forget(folder)
        read = job("read", "--invalidate=1")
        for path in folder.iterdir():
            path.unlink()
        return written, read

    return run


def redis_benchmark(port: int, named: Named) -> Round:
    """`redis-benchmark` with values of a block's size and 16 connections."""

    def one(kind: str) -> float:
        line = ["redis-benchmark", "-p", str(port), "-d", str(len(named[0][1].data)), "-c", "16",
                "-n", str(len(named)), "-t", kind, "--csv"]  # fmt: skip
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        rate = float(done.stdout.splitlines()[-1].split(",")[1].strip('"'))
        return len(named) / rate

    return lambda: (one("set"), one("get"))


def raw_objects(url: str, named: Named) -> Round:
    """The client library alone: the same values, no frame, no verification."""

    async def conduct() -> tuple[float, float]:
        remote = open_remote(url, TIMEOUT_S)
        at_once = remote.properties.max_concurrency
        put = await _each([lambda n=n, b=b: remote.put(f"raw/{n}", (b.data,))  # type: ignore[misc]
                           for n, b in named], at_once)  # fmt: skip
        got = await _each([lambda n=n: remote.get(f"raw/{n}") for n, _ in named], at_once)  # type: ignore[misc]
        await remote.delete_prefix("raw/")
        await remote.close()
        return put, got

    return lambda: asyncio.run(conduct())


def raw_files(folder: Path, named: Named) -> Round:
    """The same files by plain calls in eight threads: no frame, no verification."""

    def write(one: tuple[str, Block]) -> None:
        descriptor = os.open(folder / one[0], os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, one[1].data)
        os.fsync(descriptor)
        os.close(descriptor)

    def run() -> tuple[float, float]:
        times = []
        with ThreadPoolExecutor(8) as threads:
            for work in (write, lambda one: (folder / one[0]).read_bytes()):
                start = perf_counter()
                list(threads.map(work, named))
                times.append(perf_counter() - start)
                forget(folder)
        for path in folder.iterdir():
            path.unlink()
        return times[0], times[1]

    return run


# --- the lineup -----------------------------------------------------------------------------------


@contextmanager
def lineup(folder: Path, named: Named) -> Iterator[tuple[list[Arm], list[str]]]:
    """Every arm that this machine has, and what is missing."""
    budget = 4 * sum(len(block.data) for _, block in named)
    room = 2 * len(named) * slot_bytes(len(named[0][1].data))
    missing: list[str] = []

    def nothing() -> None:
        return

    async def device() -> Tier:
        return DeviceTier(budget)

    async def host() -> Tier:
        return HostTier(Arena.create(room))

    async def disk() -> Tier:
        return await DiskTier.open(folder / "disk", budget)

    arms = [
        Arm("memcpy", "memcpy", memcpy(named)),
        Arm("device (CPU)", "memcpy", through(device, named, nothing)),
        Arm("host", "memcpy", through(host, named, nothing)),
    ]
    (folder / "files").mkdir()
    arms.append(Arm("plain files", "plain files", raw_files(folder / "files", named)))
    if shutil.which("fio"):
        (folder / "fio").mkdir()
        arms.append(Arm("fio", "plain files", fio(folder / "fio", named)))
    else:
        missing.append("fio")
    forgets = lambda: forget(folder / "disk" / "blocks")  # noqa: E731
    arms.append(Arm("disk", "plain files", through(disk, named, forgets)))
    with ExitStack() as servers:
        for kind, url, own in _remotes(folder, servers, named, missing):

            async def remote(url: str = url) -> Tier:
                return RemoteTier(open_remote(url, TIMEOUT_S))

            alone = f"{kind}: client alone"
            if own is not None:
                arms.append(Arm(f"{kind}: its own benchmark", alone, own))
            arms.append(Arm(alone, alone, raw_objects(url, named)))
            arms.append(Arm(kind, alone, through(remote, named, nothing)))
        yield arms, missing


def _remotes(
    folder: Path, servers: ExitStack, named: Named, missing: list[str]
) -> Iterator[tuple[str, str, Round | None]]:
    """Name, address, and its own benchmark, of every engine on this machine."""
    if RedisServer.installed():
        redis = servers.enter_context(RedisServer(folder / "redis"))
        own = redis_benchmark(redis.port, named) if shutil.which("redis-benchmark") else None
        yield "redis", redis.url("bench"), own
    else:
        missing.append("redis-server")
    if S3Server.installed():
        s3 = servers.enter_context(S3Server(folder / "s3"))
        os.environ.update(s3.environment)
        yield "s3 (rclone)", s3.url("bench"), None
    else:
        missing.append("rclone")
    if MooncakeMaster.installed():
        master = servers.enter_context(MooncakeMaster(folder / "master"))
        servers.enter_context(MooncakeClient(folder / "lender", master, "1GB"))
        yield "mooncake (TCP)", master.url("bench"), None
    else:
        missing.append("Mooncake")


def measure(options: Options) -> Result:
    """All arms, one after the other, so often."""
    named = make_blocks(options.size(BLOCKS, SHORT_BLOCKS))
    rounds = SHORT_ROUNDS if options.short else ROUNDS
    times: dict[str, list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="kvshare-tiers-", dir=Path.cwd()) as place,
        lineup(Path(place), named) as (arms, missing),
    ):
        for turn in track(range(rounds + 1), "Rounds"):
            for arm in arms if turn % 2 else reversed(arms):
                times.setdefault(arm.name, []).append(arm.run())
        beside = {arm.name: arm.beside for arm in arms}
        order = [arm.name for arm in arms]
    gigabytes = sum(len(block.data) for _, block in named) / 1e9
    measured = {name: times[name][1:] for name in order}  # the first warms up
    return Result(
        name="tiers",
        title="Tiers: putting and getting blocks, beside the medium without us",
        n={"blocks": len(named), "rounds": rounds},
        seed=0,
        model="none (random rows of SmolLM2-135M's shape, "
        f"{len(named[0][1].data):,} bytes a block)",
        noise_floor="the spread over rounds, in the table",
        columns=["arm", "put GB/s", "spread", "get GB/s", "spread", "beside", "put ratio",
                 "get ratio"],
        rows=[_row(name, measured, beside[name], gigabytes) for name in order],
        notes=[*_NOTES, *([f"not on this machine: {', '.join(missing)}"] if missing else [])],
    )  # fmt: skip


_NOTES = [
    "Rounds go through all arms, forwards and backwards; medians. A ratio is of two rates of the "
    "same round: the arm's and that of the arm it stands beside.",
    "Every get of ours but those of memory is verified (BLAKE3 over all bytes) and is a copy that "
    "belongs to the caller. host: put copies into the arena, get copies out; engines do not use "
    "get, they read in place.",
    "disk: each file fsynced, renamed, its folder fsynced; read after the system was told to "
    "forget it. plain files: fsynced, neither renamed nor verified. fio: one fsync at the end of "
    "each job.",
    "s3: `rclone serve s3` over a folder on the same disk. Redis: appendonly, fsync on every "
    "write, as in the tests. Everything shares two cores with its server.",
]


def _row(
    name: str, measured: dict[str, list[tuple[float, float]]], beside: str, gigabytes: float
) -> list[Cell]:
    cells: list[Cell] = [name]
    for which in (0, 1):
        rates = sorted(gigabytes / times[which] for times in measured[name])
        cells += [median(rates), f"{rates[0]:.2f} to {rates[-1]:.2f}"]
    cells.append(beside if beside != name else None)
    for which in (0, 1):
        pairs = zip(measured[name], measured[beside], strict=True)
        ratios = [theirs[which] / ours[which] for ours, theirs in pairs]
        cells.append(median(ratios))
    return cells


def draw(result: Result) -> Figure:
    """Rates of all arms on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    names = [str(row[0]) for row in result.rows][::-1]
    for offset, column, colour, hatch, label in (
        (0.2, 1, "0.6", "", "put"),
        (-0.2, 3, "white", "//", "get"),
    ):
        axes.barh([at + offset for at in range(len(names))],
                  [float(row[column] or 0) for row in result.rows[::-1]], 0.4,
                  edgecolor="black", label=label, color=colour, hatch=hatch)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xlabel("GB of rows a second")
    axes.legend()
    return figure
