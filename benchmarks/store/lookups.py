"""Lookups of a real store: rate, the cost of crafted prompts, and latency beside a slow tier."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import Any

import numpy as np

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.metadata_replay import MetadataStore, Sources
from kvshare_store import KVLayout, Namespace, Store, StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.lookup.search import Search
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome
from kvshare_store.save.staging import Reuse

NODES, LENGTH, FAMILIES, THREADS = 1_000, 1_000, 40, 8
LONG, SHORT_LONG = 131_072, 32_768
SECONDS, SHORT_SECONDS = 5.0, 1.0
SLOW_TIER_S = 0.2
TARGET_P99_MS, TARGET_ALIGNMENT_MS, TARGET_BESIDE_MS = 10.0, 50.0, 2.0
_PROMPTS = 2_000
TARGET_PLANS = 714
"""Twice what the store made before lookups left its lock."""
NAMESPACE = Namespace("plans", KVLayout(1, 1, 4, "float16"))


def noise(seed: int, length: int, low: int = 10, high: int = 30_000) -> Tokens:
    """Tokens at random."""
    return np.random.default_rng(seed).integers(low, high, length).astype(np.int32)


def family(number: int) -> Tokens:
    """What the prompts of a family have in common."""
    return noise(500 + number % FAMILIES, LENGTH)


def edited(seed: int) -> Tokens:
    """A prompt of a family in which eight tokens are others."""
    tokens = family(seed)
    tokens[50::130] = noise(7_000 + seed, len(tokens[50::130]))
    return tokens


@contextmanager
def opened(**settings: Any) -> Iterator[Store]:
    """A store in a folder of its own."""
    gc.freeze()  # as a daemon does
    with tempfile.TemporaryDirectory(prefix="kvshare-plans-") as home:
        base = {"home": home, "host_bytes": 256 << 20, "semantic": "never", "min_saving_ms": -1e9}
        with Store(StoreConfig(**base | settings)) as store:
            yield store
    gc.unfreeze()


def save(store: Store, tokens: Tokens, seed: int) -> None:
    """Store a prompt with random rows, so that no two share a block."""
    rows = np.random.default_rng(seed).standard_normal(NAMESPACE.layout.shape(len(tokens)))
    store.save(tokens, NAMESPACE, rows.astype(np.float16))


def save_families(client: Client, namespace: Namespace, count: int) -> None:
    """Store what so many families have in common, through a daemon, with random rows."""
    chance = np.random.default_rng(0)
    for number in range(count):
        staged = client.stage(family(number), namespace, Reuse())
        row_bytes = namespace.layout.row_bytes
        client.commit(staged, (chance.bytes(rows * row_bytes) for rows in staged.sizes))
    client.flush()


def fill(store: Store) -> None:
    """Half of the nodes are members of families, the others are like nothing."""
    for at in range(NODES):
        tokens = family(at) if at % 2 else noise(at, LENGTH)
        tokens[::97] = noise(3_000 + at, len(tokens[::97]))
        save(store, tokens, at)
        if at % 100 == 99:
            store.flush()


def rate(
    store: Store, prompt: Callable[[int], Tokens], threads: int, seconds: float
) -> tuple[float, float, float, float]:
    """Plans a second, median and 99th percentile of milliseconds, processor milliseconds a plan."""
    times: list[list[float]] = [[] for _ in range(threads)]
    prompts = [prompt(number) for number in range(_PROMPTS)]
    stop = perf_counter() + seconds

    def ask(mine: list[float], number: int) -> None:
        while perf_counter() < stop:
            tokens = prompts[(len(mine) * threads + number) % _PROMPTS]
            start = perf_counter()
            plan = store.plan(tokens, NAMESPACE)
            mine.append(1e3 * (perf_counter() - start))
            if plan.lease:
                store.finish(plan, Outcome(failed="not used"))

    askers = [
        threading.Thread(target=ask, args=pair) for pair in zip(times, range(threads), strict=True)
    ]
    cpu = process_time()
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    cpu = process_time() - cpu
    every = np.concatenate(times)
    p50, p99 = np.percentile(every, (50, 99))
    return len(every) / seconds, float(p50), float(p99), 1e3 * cpu / len(every)


class _TimedSearch(Search):
    """Counts the seconds in which donors are aligned."""

    seconds = 0.0

    def _take_donor(self, *given: Any) -> bool:
        start = perf_counter()
        taken = super()._take_donor(*given)
        _TimedSearch.seconds += perf_counter() - start
        return taken

    def _fill_gaps(self, *given: Any) -> None:
        start = perf_counter()
        super()._fill_gaps(*given)
        _TimedSearch.seconds += perf_counter() - start

    def _align_the_rest(self) -> None:
        start = perf_counter()
        super()._align_the_rest()
        _TimedSearch.seconds += perf_counter() - start


class _Timed(Planner):
    _search = _TimedSearch


def crafted(length: int) -> Iterator[tuple[str, Tokens, Sequence[Tokens]]]:
    """Prompts that are hard to align, each with what is stored before it."""
    text = noise(0, length)
    pieces = text.reshape(-1, 32)
    order = np.random.default_rng(5).permutation(len(pieces))
    counts = np.arange(length // 9 + 1)
    grams = [100 + (counts >> bit & 1) for bit in range(8)] + [200 + counts * 9 % 5_000]
    two_values = np.concatenate((text[: length // 2], noise(1, length // 2, 100, 102)))
    yield "novel", noise(9, length), [noise(10 + at, length) for at in range(8)]
    yield (
        "periods of 7 to 15 tokens",
        np.resize(np.arange(7, dtype=np.int32), length),
        [np.resize(np.arange(8 + at, dtype=np.int32), length) for at in range(8)],
    )
    stored = np.stack(grams, 1).ravel()[:length].astype(np.int32)
    yield (
        "every 8-gram, no passage",
        two_values,
        [text, *(np.roll(stored, 9 * at) for at in range(7))],
    )
    changed = text.copy()
    changed[::24] = 5
    yield "every 24th token", changed, [text]
    yield "moved pieces of 32 tokens", pieces[order].ravel(), [text]
    values = [noise(20 + at, length, 100, 102) for at in range(9)]
    yield "two tokens at random", values[0], values[1:]
    passages = np.arange(length) % 220 >= 180
    first, second = (np.where(passages, text, values[at]) for at in (0, 1))
    yield "two tokens at random between passages", first, [second]


def alignment(length: int) -> Iterator[tuple[str, float, float]]:
    """Milliseconds of alignment and of the whole lookup for each crafted prompt; the median of
    five."""
    for name, request, donors in crafted(length):
        store = MetadataStore(PRESETS["aggressive"], Sources(semantic=False), all_exact=True)
        for tokens in donors:
            store.save(tokens.astype(np.int32), None)
        store.planner = _Timed(store.config, Effort)
        aligned, whole = [], []
        for _ in range(5):
            _TimedSearch.seconds, start = 0.0, perf_counter()
            store.plan(request.astype(np.int32))
            aligned.append(1e3 * _TimedSearch.seconds)
            whole.append(1e3 * (perf_counter() - start))
        yield name, float(np.median(aligned)), float(np.median(whole))


def beside_a_slow_tier() -> float:
    """Milliseconds of a lookup whose rows are in memory while another's come from a tier that takes
    `SLOW_TIER_S`; the median of 20."""
    with tempfile.TemporaryDirectory(prefix="kvshare-plans-") as home:
        with opened(home=home) as store:
            save(store, family(1), 1)
        with opened(home=home, plan_deadline_ms=5_000.0) as store:
            save(store, family(2), 2)
            get = store.blocks.levels.get

            async def slow(name: str) -> Any:
                await asyncio.sleep(SLOW_TIER_S)
                return await get(name)

            store.blocks.levels.get = slow  # type: ignore[method-assign]
            cold = store.plan_soon(np.append(family(1), 1), NAMESPACE)
            times = []
            for _ in range(20):
                start = perf_counter()
                plan = store.plan(np.append(family(2), 1), NAMESPACE)
                times.append(1e3 * (perf_counter() - start))
                store.finish(plan, Outcome(failed="not used"))
            waited = not cold.done()
            store.finish(cold.result(), Outcome(failed="not used"))
    if not waited:
        raise RuntimeError("the slow lookup ended before the fast ones")
    return float(np.median(times))


def measure(options: Options) -> Result:
    """Rates first, then crafted prompts, then the slow tier."""
    seconds = SHORT_SECONDS if options.short else SECONDS
    rows: list[list[Cell]] = []
    with opened(disk=False) as store:
        fill(store)
        known = next(iter(store.tree)).tokens
        for name, prompt, threads in (
            ("novel", lambda at: noise(90_000 + at, LENGTH), 1),
            ("an exact prefix and 20 tokens", lambda at: np.append(known, noise(at, 20)), 1),
            ("eight tokens changed", edited, 1),
            ("eight tokens changed", edited, THREADS),
        ):
            measured = rate(store, prompt, threads, seconds)
            rows.append([name, LENGTH, threads, *measured, None])
    plans, _, p99 = rows[-1][3:6]
    length = SHORT_LONG if options.short else LONG
    longest = 0.0
    for name, aligned, whole in alignment(length):
        longest = max(longest, aligned)
        rows.append([name, length, 1, None, whole, None, None, aligned])
    beside = beside_a_slow_tier()
    rows.append(["in memory, beside a tier of 200 ms", LENGTH, 1, None, beside, None, None, None])
    return Result(
        name="plans",
        title=f"Lookups with {NODES:,} stored prompts, crafted prompts, and a slow tier",
        n={"nodes": NODES, "seconds": int(seconds)},
        seed=options.seed,
        model="none (rows of 16 bytes)",
        noise_floor=f"load average while it ran: {os.getloadavg()[0]:.1f}",
        columns=_COLUMNS,
        rows=rows,
        notes=_NOTES,
        targets=[
            (f"≥ {TARGET_PLANS} edited plans a second with {THREADS} threads", f"{plans:.0f}",
             float(plans or 0) >= TARGET_PLANS),
            (f"p99 ≤ {TARGET_P99_MS:.0f} ms with {THREADS} threads", f"{p99:.1f} ms",
             float(p99 or 0) <= TARGET_P99_MS),
            (f"≤ {TARGET_ALIGNMENT_MS:.0f} ms of alignment for any prompt", f"{longest:.0f} ms",
             longest <= TARGET_ALIGNMENT_MS),
            (f"≤ {TARGET_BESIDE_MS:.0f} ms beside a slow tier", f"{beside:.2f} ms",
             beside <= TARGET_BESIDE_MS),
        ],
    )  # fmt: skip


_COLUMNS = [
    "prompt", "tokens", "threads", "plans/s", "p50 ms", "p99 ms", "CPU ms", "alignment ms",
]  # fmt: skip

_NOTES = [
    "In process: no socket, no engine. Every plan is leased and given back.",
    "Stored: 500 prompts of 40 families that differ in every 97th token, and 500 like nothing.",
    "Crafted prompts: policy `aggressive`, the median of five lookups; `alignment`: all donors of "
    "a lookup together. The rest is hashing the prompt for its exact prefix and its words.",
    "On a machine that does other work too the 99th percentile is that of the machine.",
]
