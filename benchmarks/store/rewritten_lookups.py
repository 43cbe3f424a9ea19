"""Lookups of rewritten histories in a warm store: how long they take and how much they find."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import perf_counter, thread_time
from typing import NamedTuple

import numpy as np

from benchmarks.data.rewritten_prompts import REWRITES, History, Request, Texts
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.lookups import NAMESPACE, opened, save
from kvshare_store import Store
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.lookup.policy import PRESETS, kept_positions
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome

LENGTHS = (1_000, 8_000, 16_000, 64_000, 100_000)
SHORT_LENGTHS = (1_000, 8_000)
OTHERS, TURNS, BASES = 250, 5, 2
"""Stored prompts that are like the others in kind, turns of each history that are stored, and
histories of each length."""
TARGETS_MS = {8_000: 2.0, 64_000: 10.0}
_POLICY = PRESETS["balanced"]
_ROUNDS = 3


class _Measured(NamedTuple):
    wall_ms: float
    cpu_ms: float
    reused: int
    there: int


def stored(texts: Texts, length: int, base: int) -> Iterator[Tokens]:
    """The last turns of a history, and the last one with another ending and another beginning."""
    history = History(texts, length, base)
    last = len(history.messages)
    for turn in range(max(1, last - TURNS + 1), last + 1):
        yield history.tokens(turn)
    ended = history.tokens()
    yield np.concatenate((ended[: -len(ended) // 20], history.fresh(200)))
    yield np.concatenate((history.fresh(len(history.system)), ended[len(history.system) :]))[
        : -len(ended) // 10
    ]


def fill(store: Store, texts: Texts, lengths: tuple[int, ...]) -> int:
    """Store the histories and the others; how many prompts there are."""
    prompts = [
        History(texts, int(length), 1_000 + at).tokens()
        for at, length in enumerate(np.random.default_rng(1).integers(800, 4_000, OTHERS))
    ]
    for base in range(BASES):
        prompts += [tokens for length in lengths for tokens in stored(texts, length, base)]
    for at, tokens in enumerate(prompts):
        save(store, tokens, at)
        if at % 20 == 19:
            store.flush()
    store.flush()
    return len(prompts)


def there(request: Request, history: Tokens) -> int:
    """Tokens that a plan would reuse if it knew how the request was made."""
    donor_of = np.where(request.source_of >= 0, 0, -1)
    exact = common_prefix(request.tokens, history)
    keep = kept_positions(_POLICY, request.tokens, donor_of, request.source_of, exact)
    return int(np.count_nonzero(keep))


def ask(store: Store, request: Request, history: Tokens) -> _Measured:
    """One lookup."""
    cpu, start = thread_time(), perf_counter()
    plan = store.plan(request.tokens, NAMESPACE)
    wall, cpu = perf_counter() - start, thread_time() - cpu
    if plan.lease:
        store.finish(plan, Outcome(failed="not used"))
    reused = sum(span.length for span in plan.spans)
    return _Measured(1e3 * wall, 1e3 * cpu, reused, there(request, history))


def asked(store: Store, texts: Texts, length: int, name: str, count: int) -> list[_Measured]:
    """`count` different requests, each asked a few times."""
    histories = [History(texts, length, base) for base in range(BASES)]
    requests = []
    for at in range(count):
        history = histories[at % BASES]
        requests.append((REWRITES[name](history), history.tokens()))
    return [ask(store, *each) for _ in range(_ROUNDS) for each in requests]


def measure(options: Options) -> Result:
    """All lengths, all kinds."""
    texts = Texts(options.data)
    lengths = SHORT_LENGTHS if options.short else LENGTHS
    count = options.size(12, 4)
    rows: list[list[Cell]] = []
    slowest = dict.fromkeys(TARGETS_MS, 0.0)
    with opened(disk=False, host_bytes=1 << 30) as store:
        nodes = fill(store, texts, lengths)
        for length in lengths:
            for name in REWRITES:
                got = asked(store, texts, length, name, count)
                walls, cpus = ([each[at] for each in got] for at in (0, 1))
                p50, p99 = np.percentile(walls, (50, 99)).tolist()
                cpu, cpu99 = np.percentile(cpus, (50, 99)).tolist()
                found = sum(each.reused for each in got) / sum(each.there for each in got)
                rows.append([name, length, p50, p99, cpu, cpu99, found])
                if length in slowest:
                    slowest[length] = max(slowest[length], p99)
    return Result(
        name="lookups",
        title=f"Lookups of rewritten histories, {nodes} stored prompts",
        n={"requests": count, "rounds": _ROUNDS},
        seed=options.seed,
        model="none (rows of 16 bytes)",
        noise_floor=f"load average while it ran: {os.getloadavg()[0]:.1f}",
        columns=_COLUMNS,
        rows=rows,
        notes=_NOTES,
        targets=[
            (f"p99 ≤ {TARGETS_MS[length]:.0f} ms at {length:,} tokens", f"{took:.1f} ms",
             took <= TARGETS_MS[length])
            for length, took in slowest.items() if length in lengths
        ],
    )  # fmt: skip


_COLUMNS = ["request", "tokens", "p50 ms", "p99 ms", "CPU ms", "CPU p99 ms", "found"]

_NOTES = [
    "In process, policy `balanced`; each plan is leased and given back.",
    "Stored: the last turns of two histories of each length with near-duplicates, and 250 others.",
    "found: tokens reused ÷ those that a plan would reuse which knew how the request was made; "
    "above 1 where other prompts serve as well.",
]
