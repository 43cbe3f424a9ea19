"""`kvshare simulate TRACE`: what a trace would have found in tiers of some size, by eviction
policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table

from kvshare_store.cli.common import plain_table
from kvshare_store.cli.progress import progress
from kvshare_store.cli.simulated import Points
from kvshare_store.errors import ConfigError
from kvshare_store.readable import bar, share

if TYPE_CHECKING:
    from kvshare_store.simulate.replay import Machine

_SAMPLES = 200
"""Points of a plotted line."""


def run(trace: Path, machines: Sequence[Machine], block_tokens: int, tokenize: Any) -> Points:
    """Let every machine serve every request; returns the shares found, request by request."""
    from kvshare_store.simulate.traces import requests  # noqa: PLC0415 - NumPy, not for --help

    points: Points = {machine.policy: [] for machine in machines}
    every = 1
    try:
        with progress() as shown, trace.open("rb") as file:
            task = shown.add_task(trace.name, total=trace.stat().st_size)
            for number, request in enumerate(requests(file, block_tokens, tokenize), 1):
                for machine in machines:
                    machine.serve(request)
                if number % every:
                    continue
                shown.update(task, completed=file.tell())
                for machine in machines:
                    points[machine.policy].append((number, machine.served.hit_rate))
                if len(points[machines[0].policy]) == 2 * _SAMPLES:
                    every *= 2
                    points = {name: line[1::2] for name, line in points.items()}
    except OSError as error:
        raise ConfigError(f"trace {trace} cannot be read: {error.strerror}") from error
    if not machines[0].served.tokens:
        raise ConfigError(f"trace {trace} has no requests")
    return points


def report(machines: Sequence[Machine]) -> list[dict[str, Any]]:
    """What each machine served, in plain types. All but `requests` are tokens."""
    return [
        {"policy": machine.policy, **msgspec.structs.asdict(machine.served),
         "hit_rate": machine.served.hit_rate}
        for machine in machines
    ]  # fmt: skip


def table(result: Sequence[dict[str, Any]]) -> Table:
    """A line for each policy; the last line is the upper bound of all."""
    first = result[0]
    title = f"{first['requests']:,} requests, {first['tokens']:,} tokens"
    found = plain_table(title=title)
    found.add_column("policy", style="cyan", no_wrap=True)
    for column in ("found", "host", "disk"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("")
    for row in result:
        hits, tokens = row["host"] + row["disk"], row["tokens"]
        cells = (share(hits, tokens), share(row["host"], tokens), share(row["disk"], tokens))
        found.add_row(row["policy"], *cells, bar(hits, tokens))
    return found
