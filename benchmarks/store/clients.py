"""Many clients of one daemon that plan and load, each at a steady pace, for a long time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from contextlib import ExitStack
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil

from benchmarks.harness.plots import LINES, cumulative
from benchmarks.harness.result import Cell, MissingPartError, Options, Result
from benchmarks.store.lookups import FAMILIES, edited, save_families
from kvshare_store import KVLayout, Namespace, StoreConfig
from kvshare_store.cli.progress import track
from kvshare_store.daemon.client import Client
from kvshare_store.errors import KVShareError
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome, ReusePlan
from tests.support.browser import browser, chromium
from tests.support.daemons import DaemonProgram
from tests.support.page import page_url
from tests.support.prometheus import missing, prometheus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, PROCESSES = 64, 4
SECONDS, SHORT_SECONDS = 600, 20
PACE_S = 2.0
"""Between two requests of one client, on average."""
TARGET_P99_MS, TARGET_GROWTH = 10.0, 0.02
NAMESPACE = Namespace("clients", KVLayout(30, 3, 64, "bfloat16"))
EVERY_S, WARM_S, START_S = 5.0, 10.0, 120.0
"""How often memory is looked at; how long requests are not counted at first; how long processes may
take to start."""


class Asked(NamedTuple):
    """What the clients of one process saw."""

    requests: list[tuple[float, float, int]]
    errors: list[str]


def load(client: Client, plan: ReusePlan) -> int:
    """Copy the blocks of a plan out of the arena; how many bytes."""
    leased = client.leased_rows(plan.lease, plan.arena, plan.blocks)
    loaded = 0
    for ref in plan.blocks:
        loaded += np.frombuffer(leased.rows(ref.offset, ref.nbytes), np.uint8).copy().nbytes
        leased.check(ref)
    return loaded


def request(client: Client, tokens: Tokens) -> tuple[float, float, int]:
    """Milliseconds of the plan, milliseconds and bytes of the load; no bytes for a miss."""
    start = perf_counter()
    plan = client.plan(tokens, NAMESPACE)
    planned = perf_counter()
    if plan.declined:
        return 1e3 * (planned - start), 0.0, 0
    loaded = load(client, plan)
    took = perf_counter() - planned
    edited_rows, missing = plan.reused - plan.exact, plan.tokens - plan.reused
    used = plan.reused * NAMESPACE.layout.row_bytes
    client.finish(plan.lease, Outcome(plan.exact, edited_rows, missing, used, took))
    return 1e3 * (planned - start), 1e3 * took, loaded


def ask(home: str, number: int, begin: float, stop: float, asked: Asked) -> None:
    """One client: requests at random times until `stop`; those from `begin` on are kept. Both are
    seconds of the monotonic clock."""
    chance = np.random.default_rng(number)
    with Client(home) as client:
        while (due := time.monotonic() + chance.exponential(PACE_S)) < stop:
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                got = request(client, edited(int(chance.integers(1 << 20))))
            except KVShareError as error:
                asked.errors.append(repr(error))
            else:
                asked.requests.extend([got] if due >= begin else [])


def ask_all(
    home: str, numbers: list[int], ready: Barrier, seconds: float, done: Queue[Asked]
) -> None:
    """The clients of one process, a thread each, once all processes are there."""
    asked = Asked([], [])
    ready.wait(START_S)
    begin = time.monotonic() + WARM_S
    each = [
        threading.Thread(target=ask, args=(home, number, begin, begin + seconds, asked))
        for number in numbers
    ]
    for one in each:
        one.start()
    for one in each:
        one.join()
    done.put(asked)


class Watched(NamedTuple):
    """What a run of all clients showed."""

    requests: list[tuple[float, float, int]]
    errors: list[str]
    memory: list[float]
    """MiB that only the daemon has, every few seconds."""
    cpu: float
    """Cores that the daemon used, on average."""


def watch(daemon: DaemonProgram, seconds: float, what: str) -> Watched:
    """Let all clients ask for so long, and look at the daemon meanwhile."""
    assert daemon.process is not None
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Barrier(PROCESSES + 1), spawn.Queue()
    home = str(daemon.config.home_path)
    processes = [
        spawn.Process(
            target=ask_all, args=(home, list(range(at, CLIENTS, PROCESSES)), ready, seconds, done)
        )
        for at in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    ready.wait(START_S)
    stop = time.monotonic() + WARM_S + seconds
    time.sleep(WARM_S)
    memory, cpu = seen(daemon.process.pid, stop, what)
    asked = [done.get(timeout=60.0) for _ in processes]
    for process in processes:
        process.join()
    requests = [each for one in asked for each in one.requests]
    return Watched(requests, [error for one in asked for error in one.errors], memory, cpu)


def seen(pid: int, stop: float, what: str) -> tuple[list[float], float]:
    """Private memory of a process every few seconds, and the cores that it uses."""
    process = psutil.Process(pid)
    before, start = sum(process.cpu_times()[:2]), time.monotonic()
    memory = []
    for _ in track(range(max(2, int((stop - start) / EVERY_S))), what):
        memory.append(process.memory_full_info().uss / 2**20)
        time.sleep(max(0.0, min(EVERY_S, stop - time.monotonic())))
    return memory, (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - start)


def measure(options: Options) -> Result:
    """The clients alone, then with the page open in a browser and Prometheus beside them."""
    if lacking := missing() or ("" if chromium() else "chromium"):
        raise MissingPartError(f"this machine lacks {lacking}")
    seconds = SHORT_SECONDS if options.short else SECONDS
    with tempfile.TemporaryDirectory(prefix="kvshare-clients-") as name, ExitStack() as stack:
        folder = Path(name)
        settings = {"host_bytes": 2 << 30, "disk": False, "http": "127.0.0.1:0"}
        daemon = stack.enter_context(
            DaemonProgram(StoreConfig(home=str(folder / "home"), **settings))
        )
        with Client(daemon.config.home_path) as client:
            save_families(client, NAMESPACE, FAMILIES)
        alone = watch(daemon, seconds, "Clients alone")
        url = page_url(daemon.config.home_path)
        stack.enter_context(prometheus(folder, [url.removeprefix("http://")]))
        stack.enter_context(browser(folder)).open(f"{url}/")
        beside = watch(daemon, seconds, "Clients, the page, Prometheus")
    return result(options, seconds, {"alone": alone, "page and Prometheus": beside})


def result(options: Options, seconds: int, runs: dict[str, Watched]) -> Result:
    """The table, and what of the goals is reached."""
    rows: list[list[Cell]] = []
    targets: list[tuple[str, str, bool]] = []
    for name, run in runs.items():
        plans, loads, nbytes = (np.asarray(each) for each in zip(*run.requests, strict=True))
        p50, p99 = np.percentile(plans, (50, 99)).tolist()
        load99 = float(np.percentile(loads, 99))
        quarter = max(1, len(run.memory) // 4)
        first, last = np.median(run.memory[:quarter]), np.median(run.memory[-quarter:])
        growth = float(last / first - 1)
        rate, misses = len(plans) / seconds, int(np.count_nonzero(nbytes == 0))
        rows.append([name, rate, p50, p99, float(plans.max()), load99, nbytes.sum() / seconds / 1e9,
                     run.cpu, float(last), 100 * growth, misses, len(run.errors)])  # fmt: skip
        targets += [
            (f"{name}: p99 of plans ≤ {TARGET_P99_MS:.0f} ms", f"{p99:.1f} ms",
             p99 <= TARGET_P99_MS),
            (f"{name}: memory of the daemon flat, within {100 * TARGET_GROWTH:.0f} %",
             f"{100 * growth:+.1f} %", growth <= TARGET_GROWTH),
            (f"{name}: no error", f"{len(run.errors)} of {len(plans)}", not run.errors),
        ]  # fmt: skip
    return Result(
        name="clients",
        title=f"{CLIENTS} clients of one daemon that plan and load",
        n={"requests": sum(len(run.requests) for run in runs.values()), "seconds": seconds},
        seed=options.seed,
        model="none (random rows of SmolLM2-135M's shape)",
        noise_floor=f"load average while it ran: {os.getloadavg()[0]:.1f}, its own included",
        columns=_COLUMNS,
        rows=rows,
        notes=_NOTES,
        targets=targets,
        series={name: sorted(plan for plan, _, _ in run.requests) for name, run in runs.items()},
    )


_COLUMNS = [
    "beside it", "plans/s", "plan p50 ms", "p99 ms", "slowest ms", "load p99 ms", "loaded GB/s",
    "daemon cores", "daemon MiB", "growth %", "misses", "errors",
]  # fmt: skip

_NOTES = [
    f"{CLIENTS} clients in {PROCESSES} processes, a connection each. A client asks every "
    f"{PACE_S:.0f} s on average, at random times: prompts of 1,000 tokens of {FAMILIES} families, "
    "eight tokens changed. It copies the blocks of its plan out of shared memory.",
    "growth: median of the daemon's private memory in the last quarter, over that in the first. "
    "The page is open in headless Chromium; it reads the daemon every ten seconds, Prometheus "
    "every second. Clients, browser and Prometheus run on the same cores as the daemon.",
]


def draw(result: Result) -> Figure:
    """How long plans took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for (name, times), (style, _) in zip(result.series.items(), LINES, strict=False):
        cumulative(axes, times, style, label=name)
    axes.axvline(TARGET_P99_MS, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds of a plan")
    axes.set_ylabel("share of plans")
    axes.legend()
    return figure
