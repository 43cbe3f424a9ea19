"""Put and get rates of every tier, beside those of its medium alone, in the same run."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.data.kv_blocks import Named, described, random_blocks
from benchmarks.harness.concurrency import spent
from benchmarks.harness.page_cache import forget
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_range
from benchmarks.store.media import (
    TIMEOUT_S,
    Round,
    fio,
    memcpy,
    raw_files,
    raw_objects,
    redis_benchmark,
)
from kvshare_store.blocks.remotes import open_remote
from kvshare_store.blocks.tiers.base import Tier
from kvshare_store.blocks.tiers.device import DeviceTier
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.host.arena import Arena, slot_bytes
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.cli.progress import track
from tests.support.servers import (
    MooncakeClient,
    MooncakeMaster,
    RedisServer,
    S3Server,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCKS, SHORT_BLOCKS = 64, 16
ROUNDS, SHORT_ROUNDS = 7, 2


class Arm(NamedTuple):
    """A tier or what it is compared with."""

    name: str
    beside: str
    """The arm that it is compared with."""
    run: Round


def through(
    make: Callable[[], Awaitable[Tier]], named: Named, between: Callable[[], None]
) -> Round:
    """Put, get and delete every block, as many at a time as the tier is worth."""

    async def conduct() -> tuple[float, float]:
        tier = await make()
        at_once = tier.properties.max_concurrency
        put = await spent([partial(tier.put, name, block) for name, block in named], at_once)
        between()
        got = await spent([partial(tier.get, name) for name, _ in named], at_once)
        for name, _ in named:
            await tier.delete(name)
        await tier.close()
        return put.wall, got.wall

    return lambda: asyncio.run(conduct())


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
    """Run all arms in turn, several rounds."""
    named = random_blocks(options.size(BLOCKS, SHORT_BLOCKS))
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
        model=described(named),
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
        rates = [gigabytes / times[which] for times in measured[name]]
        cells += median_and_range(rates)
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
