"""The cost of a lookup that finds nothing: prompts and stored nodes are all unlike each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.data.datasets import all_turns, arena_hard, sharegpt
from benchmarks.harness.models import model_folder, model_name, tokenized
from benchmarks.harness.plots import LINES
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.metadata_replay import MEASURED_TOKENS, MetadataStore, Sources
from kvshare_store.cli.progress import track
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.nodes.edits import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES = (0, 1_000, 10_000, 100_000)
SHORT_NODES = (0, 10_000)
PREFILLED = 10
"""Prompts that are prefilled for comparison."""
LONGEST_PREFILL = 1_000
TARGET_P99_MS, TARGET_SHARE = 5.0, 0.02


def unlike(texts: Sequence[Tokens], count: int, seed: int) -> list[Tokens]:
    """`count` prompts of real lengths and real tokens in random order: nothing runs through."""
    chance = np.random.default_rng(seed)
    return [
        chance.permutation(texts[at % len(texts)])
        for at in track(range(count), f"Making {count} prompts")
    ]


def fill(store: MetadataStore, prompts: Sequence[Tokens]) -> None:
    """Store prompts as nodes."""
    for tokens in track(prompts, f"Storing {len(prompts)} prompts"):
        store.save(tokens, None)


class Lookups(NamedTuple):
    """Milliseconds of each lookup by the clock and of processor time, and how many helped."""

    clock: list[float]
    cpu: list[float]
    helped: int


def timed(store: MetadataStore, prompts: Sequence[Tokens]) -> Lookups:
    """Look every prompt up once."""
    helped = 0
    clock, cpu = [], []
    for tokens in prompts:
        start, cpu_start = perf_counter(), process_time()
        plan = store.plan(tokens)
        cpu.append(1e3 * (process_time() - cpu_start))
        clock.append(1e3 * (perf_counter() - start))
        helped += not plan.declined
    return Lookups(clock, cpu, helped)


def prefill_ms(prompts: Sequence[Tokens], options: Options) -> list[float]:
    """Processor milliseconds of each prompt's prefill in transformers, fp32; the best of two."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(options), dtype=torch.float32)
    times = []
    with torch.inference_mode():
        for tokens in track(prompts, "Prefilling"):
            ids = torch.as_tensor(tokens.astype(np.int64))[None]
            taken = []
            for _ in range(2):
                start = process_time()
                model(ids, logits_to_keep=1)
                taken.append(1e3 * (process_time() - start))
            times.append(min(taken))
    return times


def measure(options: Options) -> Result:
    """Lookups against stores of growing size; none of them has anything to give."""
    folder = model_folder(options)
    arena = arena_hard(options.data)
    tokens = tokenized([prompt.text for prompt in arena], folder)
    chosen = [at for at, some in enumerate(tokens) if MEASURED_TOKENS <= len(some) <= 8_000]
    chosen = chosen[: options.size(len(chosen), 200)]
    prompts = [tokens[at] for at in chosen]
    turns = [turn.text for turn in all_turns(sharegpt(options.data, 1_000))]
    texts = [some[:2_000] for some in tokenized(turns, folder) if len(some) >= MEASURED_TOKENS]
    sizes = SHORT_NODES if options.short else NODES
    nodes = unlike(texts, max(sizes), options.seed)
    fitting = [at for at, some in enumerate(prompts) if len(some) <= LONGEST_PREFILL]
    few = fitting[:: max(1, len(fitting) // (4 if options.short else PREFILLED))]
    prefill = prefill_ms([prompts[at] for at in few], options)
    rows: list[list[Cell]] = []
    series: dict[str, Any] = {}
    store = MetadataStore(PRESETS["balanced"], Sources(semantic=False))
    for size in sizes:
        fill(store, nodes[len(store.tree) : size])
        found = timed(store, prompts)
        rows.append(_row("lexical", size, found, _share([found.cpu[at] for at in few], prefill)))
        series[f"{size:,} nodes"] = sorted(found.cpu)
    largest = rows[-1]
    cpu_p99, p99 = float(largest[5] or 0), float(largest[7] or 0)
    return Result(
        name="misses_store",
        title="A lookup that never helps: arena-hard prompts, nodes unlike them",
        n={"lookups": len(prompts), "prefills": len(few)},
        seed=options.seed,
        model=f"{model_name(options)} (prefill in transformers, fp32)",
        noise_floor=f"load average while it ran: {os.getloadavg()[0]:.1f}; a lookup in an empty "
        f"store is the floor, p99 {float(rows[0][5] or 0):.3f} ms",
        columns=[
            "nominated by",
            "nodes",
            "CPU p50 ms",
            "CPU mean ms",
            "of prefill",
            "CPU p99 ms",
            "clock p50 ms",
            "clock p99 ms",
            "helped",
        ],
        rows=rows,
        notes=_NOTES,
        targets=[
            (
                f"lexical lookups at {largest[1]:,} nodes: p99 ≤ {TARGET_P99_MS:.0f} ms",
                f"{p99:.1f} ms by the clock ({cpu_p99:.1f} ms of processor time)",
                p99 <= TARGET_P99_MS,
            ),
            (
                f"lexical lookup alone ≤ {TARGET_SHARE:.0%} of prefill",
                f"{float(largest[4] or 0):.2%}",
                float(largest[4] or 0) <= TARGET_SHARE,
            ),
        ],
        series=series,
    )


_NOTES = [
    "The planner and the index, in process: no socket, no engine. `misses` is the same in vLLM.",
    "Prompts of 64 to 8,000 tokens. Nodes: ShareGPT prompts of ≥ 64 tokens, each in a random order "
    "of its tokens, so that lengths and frequencies are real and no run of tokens recurs.",
    "Processor time is what the lookup takes of the machine, threads of libraries included; the "
    "clock is what a request waits, and also for what else runs there: see the load average.",
    "`of prefill`: sum of the lookups ÷ sum of the prefills of the same prompts, spread evenly "
    "over those of up to 1,000 tokens, both in processor time; a prefill is the best of two.",
    "`helped`: lookups that found something to reuse after all.",
]


def _share(lookups: Sequence[float], prefills: Sequence[float]) -> float:
    return sum(lookups) / sum(prefills)


def _row(what: str, nodes: int, found: Lookups, share: float) -> list[Cell]:
    cpu, clock = np.percentile(found.cpu, (50, 99)), np.percentile(found.clock, (50, 99))
    times = [float(cpu[0]), float(np.mean(found.cpu)), share, float(cpu[1]), *map(float, clock)]
    return [what, nodes, *times, found.helped]


def draw(result: Result) -> Figure:
    """The distribution of lookup times, a line for each size of the store."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    for (label, times), (line, marker) in zip(result.series.items(), LINES, strict=False):
        shares = np.linspace(0, 100, len(times))
        axes.plot(
            times, shares, line, marker=marker, markevery=max(1, len(times) // 10),
            markersize=4, color="black", linewidth=1, label=label,
        )  # fmt: skip
    axes.axvline(TARGET_P99_MS, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.set_xlabel(
        "processor milliseconds of a lookup (thin line: target for the 99th percentile)"
    )
    axes.set_ylabel("% of lookups")
    axes.legend(fontsize=8)
    axes.set_title("Lookups that never help")
    return figure
