"""Seconds from a save on one machine to reuse on another."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.harness.plots import cumulative
from benchmarks.harness.result import Cell, MissingPartError, Options, Result
from kvshare_store.cli.progress import track
from tests.support.cluster import Cluster, Machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPTS, SHORT_PROMPTS = 60, 10
TARGET_S = 1.0
_PATIENCE_S = 10.0


def reused_after(machine: Machine, seed: int) -> float:
    """Seconds from now until the machine serves the prompt from another one's rows."""
    begun = time.monotonic()
    while machine.serve(seed) != 63:
        if time.monotonic() - begun > _PATIENCE_S:
            return _PATIENCE_S
        time.sleep(0.01)
    return time.monotonic() - begun


def measure(options: Options) -> Result:
    """Save on one machine, wait until that is durable, ask the other until it hits."""
    if Cluster.missing():
        raise MissingPartError(f"this machine lacks {Cluster.missing()}")
    saving, waiting = [], []
    with tempfile.TemporaryDirectory(prefix="kvshare-machines-") as folder, ExitStack() as stack:
        one, other = Cluster(Path(folder), stack, "ab").machines
        for seed in track(range(options.size(PROMPTS, SHORT_PROMPTS)), "Prompts"):
            begun = time.monotonic()
            one.save(seed)
            saving.append(time.monotonic() - begun)
            waiting.append(reused_after(other, seed))
    both = [save + wait for save, wait in zip(saving, waiting, strict=True)]
    rows: list[list[Cell]] = [
        _row("saved until durable everywhere", saving),
        _row("from then until reused on the other machine", waiting),
        _row("both", both),
    ]
    worst = max(both)
    return Result(
        name="machines",
        title="From a prompt saved on one machine to its reuse on another, seconds",
        n={"prompts": len(saving)},
        seed=0,
        model="none (64 tokens, rows of 256 bytes)",
        noise_floor="the spread, in the table",
        columns=["what", "median", "p90", "max"],
        rows=rows,
        notes=[
            "Two daemons in network namespaces of one machine, blocks in one Mooncake Store over "
            "TCP, nodes in one LanceDB catalogue on S3 (`rclone serve s3`, no conditional writes). "
            "A daemon asks the catalogue every `sync_seconds` (0.3) what is new.",
        ],
        targets=[(
            f"a prompt computed on one machine is reused on another within {TARGET_S:.0f} s",
            f"median {median(both):.2f} s, worst of {len(both)} {worst:.2f} s",
            worst <= TARGET_S,
        )],
        series={"both": both},
    )  # fmt: skip


def _row(what: str, seconds: list[float]) -> list[Cell]:
    ordered = sorted(seconds)
    return [what, median(ordered), ordered[int(0.9 * (len(ordered) - 1))], ordered[-1]]


def draw(result: Result) -> Figure:
    """Every prompt's seconds, in order of size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    cumulative(axes, result.series["both"], "o-", markersize=3)
    axes.axvline(TARGET_S, color="grey", linewidth=0.8)
    axes.set_xlabel("seconds from saving on one machine to reuse on another")
    axes.set_ylabel("share of prompts")
    axes.set_xlim(left=0)
    return figure
