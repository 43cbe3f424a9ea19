"""One day of traffic in a minute: full tiers, recurring templates, many prompts seen once.

    python -m tests.support.churn --requests 20000 --pause-ms 0

Budgets must hold at every request, memory must stay flat, and templates must still be found after a
thousand one-time prompts. The clock of the store (leases, idle nodes) is simulated. The pause
between requests is real: without one, saves are faster than a disk.
"""

from __future__ import annotations

import ctypes
import gc
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from kvshare_store.blocks.leases import LeaseBook
from kvshare_store.config import StoreConfig
from kvshare_store.errors import NoSpaceError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from tests.support.oracle import Driver, Rows, positions_of, prompt

_SPACE = Namespace("churn", KVLayout(1, 1, 16, "float32"))
_HOURS = 24
_TEMPLATES = 40
_TEMPLATE_TOKENS = 192
_QUESTION_TOKENS = 24
_NOVEL_TOKENS = 216
_HOST_BYTES = 2 << 20
_DISK_BYTES = 6_000_000
"""Budgets with room for 75 and for 200 prompts."""
_EARLY, _LATE = 50, 1000
"""Numbers of one-time prompts so far, after which reuse is compared: over `_LONG` more of them."""
_LONG = 100
_GC_REQUESTS = 40


class Asked(NamedTuple):
    """One request. `template`: its number, or -1 for a one-time prompt."""

    tokens: list[int]
    template: int


class Hour(msgspec.Struct, frozen=True):
    """One simulated hour. Memory is that of the process alone, without shared memory and without
    what the C library keeps of freed memory."""

    reuse: float
    refused: int
    memory: int
    disk: int
    catalog: int
    nodes: int


class Figures(msgspec.Struct, frozen=True):
    """The figures of one day."""

    requests: int
    novel: int
    early: float
    """Share of the templates' tokens that was reused after 50 one-time prompts."""
    late: float
    """The same after 1,000 one-time prompts, or as many as were asked for."""
    last: float
    """The same in the last tenth of the day."""
    refused: int
    """Saves that found no room."""
    hours: tuple[Hour, ...]
    over_budget: tuple[str, ...]
    wrong_rows: int
    seconds: float

    @property
    def growth(self) -> int:
        """Bytes by which memory grew from the third quarter of the day to the last. Nodes live for
        half a day, so only in the second half do as many nodes go as come."""
        quarter = len(self.hours) // 4
        third = max(hour.memory for hour in self.hours[-2 * quarter : -quarter])
        return max(hour.memory for hour in self.hours[-quarter:]) - third

    def print(self, console: Console) -> None:
        """A table of the day, hour by hour."""
        table = Table("hour", "reuse", "refused", "memory", "disk", "catalogue", "nodes")
        for number, hour in enumerate(self.hours):
            sizes = [f"{size / 1e6:.1f}" for size in (hour.memory, hour.disk, hour.catalog)]
            table.add_row(
                str(number), f"{hour.reuse:.3f}", str(hour.refused), *sizes, str(hour.nodes)
            )
        console.print(table)
        console.print(
            f"{self.requests:,} requests, {self.novel:,} novel, in {self.seconds:.0f} s; "
            f"reuse after 50 novel {self.early:.3f}, after 1,000 {self.late:.3f} "
            f"(ratio {self.late / self.early:.3f}), at the end {self.last:.3f}; "
            f"saves refused {self.refused:,}; memory grew {self.growth / 1e6:.1f} MB; "
            f"over budget {len(self.over_budget)}, wrong rows {self.wrong_rows}"
        )


class Traffic:
    """Draws requests. Half are one of the templates (some more often than others) with a new
    question and sometimes a small edit; the other half is new from the first token on."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._templates = [prompt(number, _TEMPLATE_TOKENS) for number in range(_TEMPLATES)]
        self._weights = [1 / (rank + 1) ** 0.7 for rank in range(_TEMPLATES)]
        self._novel = _TEMPLATES

    def next(self) -> Asked:
        """The next request."""
        chance = self._chance
        self._novel += 1
        if chance.random() < 0.5:
            return Asked(prompt(self._novel, _NOVEL_TOKENS), -1)
        (number,) = chance.choices(range(_TEMPLATES), self._weights)
        tokens = self._templates[number] + prompt(self._novel, _QUESTION_TOKENS)
        if chance.random() < 0.3:
            at = chance.randrange(_TEMPLATE_TOKENS)
            tokens[at : at + 2] = prompt(self._novel, 3)
        return Asked(tokens, number)


class TokenRows:
    """Rows whose V is their token and whose K is the position they were computed at."""

    def __init__(self) -> None:
        self.layout = _SPACE.layout
        self.wrong = 0

    def computed(self, tokens: Sequence[int], exact: int, salt: str) -> Rows:
        """The rows of a prompt."""
        rows = np.empty(self.layout.shape(len(tokens)), np.uint32)
        rows[:, 0] = np.arange(len(tokens), dtype=np.uint32)[:, None, None]
        rows[:, 1] = np.asarray(tokens, np.uint32)[:, None, None]
        return rows

    def write(
        self, tokens: Sequence[int], rows: Rows, positions: Sequence[int], exact: int
    ) -> None:
        """Does nothing: rows describe themselves."""

    def check(self, tokens: Sequence[int], plan: ReusePlan, rows: Rows) -> None:
        """Count rows that are not of their token."""
        at = positions_of(plan.spans)
        sources = [span.source + step for span in plan.spans for step in range(span.length)]
        right = self.computed(tokens, 0, "")[:, :, at]
        right[:, 0] = np.asarray(sources, np.uint32)[:, None, None]
        self.wrong += int(np.count_nonzero((rows[:, :, at] != right).any(axis=(0, 1, 3, 4))))


class Clock:
    """A clock that each request advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Day:
    """One store and one day of requests to it."""

    def __init__(self, store: Store, seed: int, requests: int, late: int, pause: float) -> None:
        self._store = store
        self._rows = TokenRows()
        self._driver = Driver(store, _SPACE, self._rows)
        self._traffic = Traffic(seed)
        self._requests = requests
        self._late = late
        self._pause = pause
        self._clock = Clock()
        self._over: list[str] = []
        self._novel = 0
        self._refused = 0
        self._reused: list[tuple[int, float]] = []
        """For each request of a template: one-time prompts before it, and the share of the template
        that was reused."""
        store.tree.clock = self._clock
        store.blocks.pool.leases = LeaseBook(self._clock)

    def run(self) -> Figures:
        """Make every request, in order."""
        start, hours = time.monotonic(), []
        for hour in range(_HOURS):
            first, refused = len(self._reused), self._refused
            for number in range(hour, self._requests, _HOURS):
                self._request()
                self._clock.now += 3600 / len(range(hour, self._requests, _HOURS))
                if number // _HOURS % _GC_REQUESTS == 0:
                    self._store.collect()
                time.sleep(self._pause)
            hours.append(self._hour(first, self._refused - refused))
        tenth = self._reused[-len(self._reused) // 10 :]
        return Figures(
            self._requests,
            self._novel,
            self._reuse(_EARLY),
            self._reuse(self._late),
            float(np.mean([share for _, share in tenth])),
            self._refused,
            tuple(hours),
            tuple(self._over),
            self._rows.wrong,
            time.monotonic() - start,
        )

    def _request(self) -> None:
        asked = self._traffic.next()
        plan = self._driver.serve(asked.tokens)
        if asked.template >= 0:
            self._reused.append((self._novel, min(1.0, plan.reused / _TEMPLATE_TOKENS)))
        else:
            self._novel += 1
        try:
            self._driver.save(asked.tokens, None if plan.declined else plan)
        except NoSpaceError:
            self._refused += 1
        for tier, use in self._store.blocks.report().items():
            if use["bytes"] > use["budget"]:
                self._over.append(f"{tier} holds {use['bytes']:,} of {use['budget']:,}")

    def _reuse(self, after: int) -> float:
        novel = range(after, after + _LONG)
        return float(np.mean([share for before, share in self._reused if before in novel]))

    def _hour(self, first: int, refused: int) -> Hour:
        home = self._store.config.home_path
        disk = _bytes_in(home / "blocks")
        if disk > _DISK_BYTES:
            self._over.append(f"files take {disk:,} of {_DISK_BYTES:,}")
        return Hour(
            float(np.mean([share for _, share in self._reused[first:]])),
            refused,
            _memory(),
            disk,
            _bytes_in(home / "catalog"),
            len(self._store.tree),
        )


def _memory() -> int:
    gc.collect()
    # freed memory that is kept for the next merge of the catalogue goes up and down by 60 MB
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.stat().st_size
        except FileNotFoundError:  # it was evicted meanwhile
            continue
    return total


def churn(
    requests: int, *, seed: int = 1, late: int = _LATE, pause: float = 0.0, **settings: Any
) -> Figures:
    """A day of `requests` requests, `pause` seconds apart, on a new store. `late`: after how many
    one-time prompts reuse is compared with the early one."""
    with tempfile.TemporaryDirectory(prefix="kvshare-churn-") as folder:
        fields: dict[str, Any] = {
            "home": folder,
            "block_tokens": 16,
            "host_bytes": _HOST_BYTES,
            "disk_bytes": _DISK_BYTES,
            "min_saving_ms": 0.0,
            "policy": "aggressive",
            "semantic": "never",
            "plan_deadline_ms": 20_000.0,
            "ttl_seconds": 12 * 3600.0,
            "gc_seconds": 0.0,
        }
        with Store(StoreConfig(**fields | settings)) as store:
            return Day(store, seed, requests, late, pause).run()


def main(
    requests: Annotated[int, typer.Option(help="Requests in the day.")] = 20_000,
    pause_ms: Annotated[float, typer.Option(help="Real time between two requests.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides the traffic.")] = 1,
) -> None:
    """Print how a day with full tiers affects reuse, memory and budgets."""
    churn(requests, seed=seed, pause=pause_ms / 1e3).print(Console())


if __name__ == "__main__":
    typer.run(main)
