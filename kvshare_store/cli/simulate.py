"""`kvshare simulate`: what a trace would have found in tiers of some size, by eviction policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich import box
from rich.progress import Progress
from rich.table import Table

from kvshare_store.blocks.eviction import POLICIES
from kvshare_store.cli.common import console, print_json
from kvshare_store.cli.format import bar, share
from kvshare_store.config import parse_size
from kvshare_store.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from kvshare_store.simulate.replay import Machine

_SAMPLES = 200
"""Points of a plotted line."""

Points = dict[str, list[tuple[int, float]]]


def command(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE",
            help="JSONL, gzip or not: lines with hash_ids, with tokens, or with human turns.",
        ),
    ],
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAMES", help="Policies, parted by commas.")
    ] = ",".join(POLICIES),
    host_bytes: Annotated[
        str, typer.Option("--host-bytes", metavar="SIZE", help="Budget of the host tier.")
    ] = "4GiB",
    disk_bytes: Annotated[
        str, typer.Option("--disk-bytes", metavar="SIZE", help="Budget of the disk tier; 0: none.")
    ] = "0",
    row_bytes: Annotated[
        int, typer.Option("--row-bytes", min=1, help="K and V of a token; default: Qwen2.5-7B.")
    ] = 57_344,
    block_tokens: Annotated[
        int, typer.Option("--block-tokens", min=1, help="Tokens of a block, where lines have none.")
    ] = 64,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FILE", help="tokenizer.json for text (else bytes/4)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Write a plot.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write JSON; `-`: print it.")
    ] = None,
) -> None:
    """Replay a trace against eviction policies and show the share of tokens that were found."""
    from kvshare_store.simulate import replay, traces  # noqa: PLC0415 - NumPy, not for --help

    names = [name.strip() for name in policy.split(",") if name.strip()]
    budgets = parse_size(host_bytes, "--host-bytes"), parse_size(disk_bytes, "--disk-bytes")
    if min(budgets) < 0:
        raise ConfigError("a budget is negative")
    if plot is not None:
        _figure_class()  # before the work, not after it
    machines = replay.machines(names, *budgets, row_bytes)
    tokenize = traces.tokenizer(str(tokenizer)) if tokenizer is not None else None
    points = _replay(trace, machines, block_tokens, tokenize)
    result = report(machines)
    if json is not None:
        _write_json(json, result)
    if json != Path("-"):
        console().print(table(result))
    if plot is not None:
        _draw(points, f"{trace.name}, host {host_bytes}, disk {disk_bytes}", plot)


def _replay(trace: Path, machines: Sequence[Machine], block_tokens: int, tokenize: Any) -> Points:
    """Every machine serves every request; returns how their shares went, request by request."""
    from kvshare_store.simulate.traces import requests  # noqa: PLC0415 - NumPy, not for --help

    points: Points = {machine.policy: [] for machine in machines}
    every = 1
    try:
        with Progress(console=_stderr(), transient=True) as progress, trace.open("rb") as file:
            task = progress.add_task(trace.name, total=trace.stat().st_size)
            for number, request in enumerate(requests(file, block_tokens, tokenize), 1):
                for machine in machines:
                    machine.serve(request)
                if number % every:
                    continue
                progress.update(task, completed=file.tell())
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
    """What each machine served, as plain types. Everything but `requests` is in tokens."""
    return [
        {"policy": machine.policy, **msgspec.structs.asdict(machine.served),
         "hit_rate": machine.served.hit_rate}
        for machine in machines
    ]  # fmt: skip


def table(result: Sequence[dict[str, Any]]) -> Table:
    """A line a policy; the last is what no policy can surpass."""
    first = result[0]
    title = f"{first['requests']:,} requests, {first['tokens']:,} tokens"
    found = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    found.add_column("policy", style="cyan", no_wrap=True)
    for column in ("found", "host", "disk"):
        found.add_column(column, justify="right", no_wrap=True)
    found.add_column("")
    for row in result:
        hits, tokens = row["host"] + row["disk"], row["tokens"]
        cells = (share(hits, tokens), share(row["host"], tokens), share(row["disk"], tokens))
        found.add_row(row["policy"], *cells, bar(hits, tokens))
    return found


def _write_json(path: Path, result: Sequence[dict[str, Any]]) -> None:
    if path == Path("-"):
        print_json(list(result))
        return
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _stderr() -> Any:
    from rich.console import Console  # noqa: PLC0415 - only where there is a bar to show

    return Console(stderr=True)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional: `kvshare-store[plot]`
    except ImportError as error:
        raise UnsupportedError(
            "--plot needs a library: pip install 'kvshare-store[plot]'"
        ) from error
    return Figure


def _draw(points: Points, title: str, path: Path) -> None:
    """Share of tokens found so far, a line a policy; told apart without colour."""
    figure = _figure_class()(figsize=(7, 4))
    axes = figure.subplots()
    styles = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "x"), ("-", "D"))
    for index, (name, line) in enumerate(points.items()):
        dashes, marker = styles[index % len(styles)]
        requests, rates = [number for number, _ in line], [100 * rate for _, rate in line]
        axes.plot(
            requests, rates, dashes, marker=marker, markevery=max(1, len(line) // 10),
            color="black", linewidth=1, markersize=4, label=name,
        )  # fmt: skip
    axes.set(xlabel="requests", ylabel="% of tokens found so far", title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
