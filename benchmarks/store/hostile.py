"""Plans of a well-behaved client while other clients attack the daemon."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.lookups import NAMESPACE, edited, save_families
from kvshare_store import StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.errors import DeadlineError, OverloadError
from kvshare_store.plan import Outcome
from tests.support.attacks import ATTACKS, computing
from tests.support.daemons import DaemonProgram

PROMPTS, SECONDS, SHORT_SECONDS = 40, 10.0, 1.0
SETTLED_S, PAUSE_S = 1.0, 0.002
"""An attack begins so long before it is timed; between two plans of the client."""
TARGET_RATIO = 2.0
_PATIENCE_S = 60.0
_ROOT = Path(__file__).parents[2]


def configured(home: str) -> StoreConfig:
    """A daemon with room for everybody."""
    return StoreConfig(home=home, host_bytes=256 << 20, semantic="never", min_saving_ms=-1e9)


def timed(client: Client, seconds: float) -> list[float]:
    """Milliseconds of each plan for an edited prompt, one after the other. One that is refused or
    does not come counts as the client's whole patience."""
    times, stop = list[float](), perf_counter() + seconds
    while perf_counter() < stop:
        tokens, start = edited(len(times) % PROMPTS), perf_counter()
        try:
            plan = client.plan(tokens, NAMESPACE)
        except (DeadlineError, OverloadError):
            times.append(1e3 * _PATIENCE_S)
            continue
        times.append(1e3 * (perf_counter() - start))
        if plan.lease:
            client.finish(plan.lease, Outcome(failed="not used"))
        time.sleep(PAUSE_S)
    return times


@contextmanager
def attacked(name: str, home: Path) -> Iterator[None]:
    """A process of its own attacks until the end of the block."""
    command = [sys.executable, "-m", "tests.support.attacks", name, str(home)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE) as attacker:
        try:
            assert attacker.stdout is not None
            if not attacker.stdout.readline():
                raise RuntimeError(f"the attack {name} did not begin")
            time.sleep(SETTLED_S)
            yield
            if attacker.poll() is not None:
                raise RuntimeError(f"the attack {name} ended by itself")
        finally:
            attacker.kill()


def row_of(name: str, client: Client, home: Path, seconds: float) -> list[Cell]:
    """The client without the attack, and right afterwards with it."""
    quiet = timed(client, seconds)
    with attacked(name, home):
        during = timed(client, seconds)
    p50, p99 = np.percentile(quiet, (50, 99)).tolist()
    attacked50, attacked99 = np.percentile(during, (50, 99)).tolist()
    return [name, len(during), p50, attacked50, p99, attacked99, attacked99 / p99]


def measure(options: Options) -> Result:
    """Each attack by itself, and a process that merely computes."""
    seconds = SHORT_SECONDS if options.short else SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="kvshare-hostile-") as folder,
        DaemonProgram(configured(f"{folder}/home")) as daemon,
        Client(daemon.config.home_path, timeout=_PATIENCE_S) as client,
    ):
        save_families(client, NAMESPACE, PROMPTS)
        timed(client, seconds / 2)  # tables and costs are warm from here on
        names = [computing.__name__, *ATTACKS]
        rows = [row_of(name, client, daemon.config.home_path, seconds) for name in names]
    worst = max(rows[1:], key=lambda row: float(row[-1] or 0))
    return Result(
        name="hostile",
        title="Plans of a well-behaved client beside hostile ones",
        n={"seconds": int(seconds), "prompts": PROMPTS},
        seed=options.seed,
        model="none (rows of 16 bytes)",
        noise_floor=f"`computing`: a process that attacks nobody and takes a core; load average "
        f"while it ran: {os.getloadavg()[0]:.1f}",
        columns=["attack", "plans", "p50 ms quiet", "p50 ms", "p99 ms quiet", "p99 ms", "ratio"],
        rows=rows,
        notes=_NOTES,
        targets=[
            (f"p99 ≤ {TARGET_RATIO:.0f} times that of quiet under any attack",
             f"{float(worst[-1] or 0):.2f} ({worst[0]})", float(worst[-1] or 0) <= TARGET_RATIO),
        ],
    )  # fmt: skip


_NOTES = [
    "A real daemon. The client asks for one plan of an edited prompt of 1,000 tokens after the "
    "other, with 2 ms in between, over the socket; each attack runs in a process of its own.",
    "quiet: the same client right before that attack.",
    "fuzzed: messages that no client would send; dropped: connections opened and dropped; crowded: "
    "100 connections with half a message; unread: lookups whose answers nobody reads; flushing: "
    "flushes and garbage collections; hoarded: all leases and saves that a client may hold; "
    "flooded: a tenant that keeps 64 lookups of new prompts under way.",
]
