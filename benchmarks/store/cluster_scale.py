"""A model of what a cluster of 8 to 1,024 engines would save, from measured or assumed rates.

What can be checked is: the share of tokens that engines find in caches of their own and in a shared
store, by a formula and by replaying a production trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.data.datasets import Arrival, mooncake
from benchmarks.harness.result import Cell, Options, Result, read
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENGINES = (8, 16, 32, 64, 128, 256, 512, 1024)
REMOTES = ("redis", "s3 (rclone)", "mooncake (TCP)")
"""Their names in `tiers`."""


class Parameter(NamedTuple):
    """A number that goes into the model, and where it comes from."""

    what: str
    value: float
    source: str


class Rates(NamedTuple):
    """Everything the model needs."""

    prefill: Parameter
    row_bytes: Parameter
    remote: Parameter
    edited: Parameter
    lookup: Parameter
    requests: Parameter

    @property
    def break_even(self) -> float:
        """Bytes a second below which loading a row takes longer than computing it."""
        return self.row_bytes.value * self.prefill.value

    def saved(self, own: float, shared: float, bandwidth: float) -> tuple[float, float]:
        """Shares of all prefill time that a shared store saves, without and with edits.

        What the engine has itself needs no loading; the rest of what is shared is loaded.
        """
        net = max(0.0, 1 - self.break_even / bandwidth)
        by_prefix = own + (shared - own) * net
        return by_prefix, by_prefix + (1 - shared) * self.edited.value * net


def rates(out: Path) -> Rates:
    """Measured where `out` has the results, assumed otherwise."""
    return Rates(
        Parameter("prefill of an engine, tokens/s", 10_000.0, "assumed: 7B model on one GPU"),
        Parameter("bytes of a row", 57_344.0, "shape of Qwen2.5-7B in bf16"),
        Parameter("loading from another machine, bytes/s", 3e9, "assumed: 25 Gbit/s"),
        _edited(out / "figure4.json"),
        _lookup(out / "misses_store.json"),
        Parameter("requests of an engine, 1/s", 1.0, "assumed"),
    )


def _edited(path: Path) -> Parameter:
    what = "share reusable after edits, of what prefixes leave"
    if not path.exists():
        return Parameter(what, 0.1, "assumed: figure4 was not measured")
    rows = {(row[0], row[1]): row for row in read(path).rows}
    prefix = float(rows[("prefix caching", "all turns")][3] or 0)
    balanced = float(rows[("KVShare: balanced", "all turns")][3] or 0)
    return Parameter(what, max(0.0, balanced - prefix) / (1 - prefix), "figure4, all tokens")


def _lookup(path: Path) -> Parameter:
    what = "a lookup at the largest store measured, ms"
    if not path.exists():
        return Parameter(what, 5.0, "assumed: misses_store was not measured")
    row = [row for row in read(path).rows if row[0] == "lexical"][-1]
    source = f"misses_store, mean processor time at {row[1]:,} nodes"
    return Parameter(what, float(row[3] or 0), source)


def prefix_hits(arrivals: Sequence[Arrival], engine_of: Sequence[int]) -> float:
    """Share of blocks that follow only blocks their engine has seen before. Nothing is evicted.

    `engine_of[i]` serves request i; one engine for all stands for a shared store.
    """
    seen: set[tuple[int, int]] = set()
    hits = total = 0
    for arrival, engine in zip(arrivals, engine_of, strict=True):
        total += len(arrival.blocks)
        for block in arrival.blocks:
            if (engine, block) not in seen:
                break
            hits += 1
        seen.update((engine, block) for block in arrival.blocks)
    return hits / max(1, total)


def predicted_hits(arrivals: Sequence[Arrival], engines: int) -> float:
    """The same by formula: of k earlier requests with a block, one went to the same engine."""
    before: Counter[int] = Counter()
    found = 0.0
    total = 0
    for arrival in arrivals:
        total += len(arrival.blocks)
        found += sum(1 - (1 - 1 / engines) ** before[block] for block in arrival.blocks)
        before.update(arrival.blocks)
    return found / max(1, total)


class Line(NamedTuple):
    """One size of cluster: shares of prompt tokens; `saved_*` are shares of all prefill time."""

    engines: int
    own: float
    own_predicted: float
    shared: float
    saved_own: float
    saved_shared: float
    saved_edited: float
    lookup_cores: float


def line_of(arrivals: Sequence[Arrival], engines: int, used: Rates, seed: int) -> Line:
    """What a cluster of `engines` would find and save; requests go to engines by chance."""
    chance = np.random.default_rng(seed)
    own = prefix_hits(arrivals, chance.integers(engines, size=len(arrivals)).tolist())
    shared = prefix_hits(arrivals, [0] * len(arrivals))
    saved_shared, saved_edited = used.saved(own, shared, used.remote.value)
    cores = engines * used.requests.value * used.lookup.value / 1e3
    return Line(
        engines, own, predicted_hits(arrivals, engines), shared,
        own, saved_shared, saved_edited, cores,
    )  # fmt: skip


def measure(options: Options) -> Result:
    """Replay the conversation trace for each size of cluster."""
    arrivals = mooncake(options.data, "conversation")
    arrivals = arrivals[: options.size(len(arrivals), 3_000)]
    used = rates(options.out)
    lines = [
        line_of(arrivals, engines, used, options.seed)
        for engines in track(ENGINES, "Replaying the trace")
    ]
    off = max(abs(line.own - line.own_predicted) for line in lines)
    rows: list[list[Cell]] = [
        [*line, (line.saved_edited - line.saved_own) * line.engines] for line in lines
    ]
    return Result(
        name="scale",
        title="Scale on paper: prefill saved by a shared store, Mooncake's conversation trace",
        n={"requests": len(arrivals), "blocks of 512 tokens": sum(len(a.blocks) for a in arrivals)},
        seed=options.seed,
        model="none: a calculation over a trace",
        noise_floor=f"formula and replay differ by up to {100 * off:.1f} points",
        columns=[
            "engines",
            "own cache",
            "by formula",
            "shared store",
            "saved, own",
            "saved, shared",
            "saved, with edits",
            "cores for lookups",
            "engines' prefill gained",
        ],
        rows=rows,
        notes=[
            *_NOTES,
            *(f"{p.what}: {p.value:,.4g} ({p.source})." for p in used),
            at_measured_rates(options.out / "tiers.json", lines[-1], used),
        ],
    )


def at_measured_rates(path: Path, line: Line, used: Rates) -> str:
    """What is left of the last line with remotes as fast as they were measured."""
    said = (
        f"Below {used.break_even / 1e9:.2f} GB/s loading takes longer than computing, and sharing "
        "saves nothing"
    )
    if not path.exists():
        return f"{said}; `tiers` was not measured."
    remotes = [(row[0], float(row[3] or 0)) for row in read(path).rows if row[0] in REMOTES]
    saved = ", ".join(
        f"{name} ({rate:.2f} GB/s) {used.saved(line.own, line.shared, rate * 1e9)[1]:.0%}"
        for name, rate in remotes
    )
    return (
        f"{said}. With one store of the rates that `tiers` measured, client and server on the same "
        f"two cores, {line.engines:,} engines save with edits: {saved}; with the rate above "
        f"{line.saved_edited:.0%}, with caches of their own {line.own:.0%}."
    )


_NOTES = [
    "`own cache`, `shared store`: share of the blocks of all prompts that follow only known ones, "
    "when each engine keeps what it computed, or all share one store. Nothing is evicted, so both "
    "are upper lines. `by formula`: 1 - (1 - 1/engines)^k for a block that was requested k times "
    "before.",
    "One trace is split over more and more engines, requests to engines by chance; a router that "
    "knows what engines hold would lift `own cache`.",
    "`saved`: share of all prefill time, loading subtracted. `with edits` adds what figure4 found "
    "after prefixes, as if this traffic were like ShareGPT: the trace has no text to check it.",
    "`engines' prefill gained`: (saved with edits - saved by own caches) * engines, for engines "
    "that do nothing but prefill.",
]  # fmt: skip


def draw(result: Result) -> Figure:
    """Shares saved against the number of engines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    engines = [int(row[0] or 0) for row in result.rows]
    drawn = (
        ("own cache, replayed", 1, "-", "o"),
        ("own cache, by formula", 2, ":", "x"),
        ("saved with a shared store", 5, "--", "s"),
        ("saved with edits too", 6, "-.", "^"),
    )
    for label, column, line, marker in drawn:
        heights = [100 * float(row[column] or 0) for row in result.rows]
        axes.plot(engines, heights, line, marker=marker, color="black", label=label, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(engines, [str(count) for count in engines])
    axes.set_xlabel("engines that share the trace")
    axes.set_ylabel("% of prefill")
    axes.set_ylim(0)
    axes.legend(fontsize=8)
    axes.set_title("Prefill saved, on paper")
    return figure
