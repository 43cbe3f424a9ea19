"""`kvshare simulate`: what recorded traffic would have found, without an engine and without rows.

Of a trace: exact prefixes in tiers of some size, by eviction policy. Of prompts: all that is
reused, by reuse policy, beside the engine's own prefix cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
from rich.table import Table

from kvshare_store.cli.common import ConfigOption, SetOption, configured, console
from kvshare_store.cli.simulated import STDOUT, draw, figure_class, write_json
from kvshare_store.config import EvictionName, StoreConfig, parse_size
from kvshare_store.errors import ConfigError
from kvshare_store.readable import assumed_text, size

_HOST_BYTES = "4GiB"
_EVICTION = ",".join(get_args(EvictionName))
_REUSE = "exact,faithful,balanced,aggressive"
_ROW_BYTES = 57344
"""Of Qwen2.5-7B."""


class _Options(msgspec.Struct, frozen=True):
    """What both replays take."""

    policies: list[str]
    host_bytes: str | None
    row_bytes: int | None
    tokenizer: Path | None
    plot: Path | None
    json: Path | None


TraceArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="TRACE",
        help="JSONL, gzip or not: lines with hash_ids, with tokens, or with human turns.",
        show_default=False,
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Instead of TRACE: JSONL with `messages` (and `tools`), `prompt` or `tokens`, and "
        "`answer` or `answer_tokens`, `at`, `tenant`, `session`.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAMES",
        help=f"Policies, separated by commas. TRACE: {_EVICTION}; --prompts: {_REUSE}.",
        show_default=False,
    ),
]
HostBytesOption = Annotated[
    str | None,
    typer.Option(
        "--host-bytes",
        metavar="SIZE",
        help=f"Budget of the host tier. TRACE: {_HOST_BYTES}; --prompts: none.",
        show_default=False,
    ),
]
DiskBytesOption = Annotated[
    str, typer.Option("--disk-bytes", metavar="SIZE", help="TRACE: of the disk tier; 0: no disk.")
]
RowBytesOption = Annotated[
    str | None,
    typer.Option(
        "--row-bytes",
        metavar="BYTES|DIR",
        help="What K and V of a token take, or a model's folder that says it. Default: "
        f"{_ROW_BYTES}, as for Qwen2.5-7B.",
        show_default=False,
    ),
]
BlockTokensOption = Annotated[
    int, typer.Option("--block-tokens", min=1, help="TRACE: of a block, where lines have none.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, or its folder, for text; for messages the model's folder. TRACE: "
        "else four bytes are a token.",
    ),
]
AnswersOption = Annotated[
    bool, typer.Option("--answers/--no-answers", help="--prompts: are answers kept as well?")
]
MinTokensOption = Annotated[
    int | None,
    typer.Option(
        "--min-tokens",
        min=0,
        help="--prompts: shorter ones are stored, not counted; default: min_prompt_tokens.",
        show_default=False,
    ),
]
SettleOption = Annotated[
    str,
    typer.Option(
        "--settle",
        metavar="SECONDS",
        help="--prompts: an edited prompt is exact after so long (by `at`), or never.",
    ),
]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Write a plot.")]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE|-", help="Write JSON into a file; `-`: print it."),
]


def command(
    trace: TraceArgument = None,
    prompts: PromptsOption = None,
    policy: PolicyOption = None,
    host_bytes: HostBytesOption = None,
    disk_bytes: DiskBytesOption = "0",
    row_bytes: RowBytesOption = None,
    block_tokens: BlockTokensOption = 64,
    tokenizer: TokenizerOption = None,
    answers: AnswersOption = True,
    min_tokens: MinTokensOption = None,
    settle: SettleOption = "never",
    config: ConfigOption = None,
    settings: SetOption = None,
    plot: PlotOption = None,
    json: JsonFileOption = None,
) -> None:
    """Replay recorded traffic and show what would have been found of it, without an engine."""
    if (trace is None) == (prompts is None):
        raise ConfigError("name either a TRACE or --prompts FILE")
    if plot is not None:
        figure_class()  # before the work, not after it
    names = policy if policy is not None else _REUSE if prompts else _EVICTION
    policies = [name.strip() for name in names.split(",") if name.strip()]
    options = _Options(policies, host_bytes, _row_bytes(row_bytes), tokenizer, plot, json)
    if trace is not None:
        _of_trace(trace, options, disk_bytes, block_tokens)
    elif prompts is not None:
        store = configured(None, config, settings)
        least = store.min_prompt_tokens if min_tokens is None else min_tokens
        _of_prompts(prompts, options, store, answers, least, _seconds(settle))


def _of_trace(trace: Path, options: _Options, disk_bytes: str, block_tokens: int) -> None:
    from kvshare_store.cli import simulated_trace as simulated  # noqa: PLC0415 - NumPy
    from kvshare_store.simulate import replay, traces  # noqa: PLC0415 - NumPy, not for --help

    host_bytes = options.host_bytes or _HOST_BYTES
    budgets = _size(host_bytes, "--host-bytes"), _size(disk_bytes, "--disk-bytes")
    machines = replay.machines(options.policies, *budgets, options.row_bytes or _ROW_BYTES)
    tokenize = traces.tokenizer(options.tokenizer) if options.tokenizer is not None else None
    points = simulated.run(trace, machines, block_tokens, tokenize)
    result = simulated.report(machines)
    _show(options, result, simulated.table(result), [_room(options, budgets[0])])
    if options.plot is not None:
        draw(points, f"{trace.name}, host {host_bytes}, disk {disk_bytes}", options.plot)


def _of_prompts(
    path: Path,
    options: _Options,
    store: StoreConfig,
    answers: bool,
    least: int,
    settle: float | None,
) -> None:
    from kvshare_store.cli import simulated_prompts as simulated  # noqa: PLC0415 - NumPy
    from kvshare_store.simulate import prompt_replay, prompts, traces  # noqa: PLC0415 - NumPy

    budget = math.inf if options.host_bytes is None else _size(options.host_bytes, "--host-bytes")
    room = prompt_replay.Room(options.row_bytes or _ROW_BYTES, budget, settle)
    folder = str(options.tokenizer or "")
    arms = prompt_replay.arms_of(store, options.policies, room, folder)
    reader = prompts.Reader(answers=answers, timed=settle is not None)
    if options.tokenizer is not None:
        tokenize = traces.tokenizer(options.tokenizer)
        reader = reader._replace(tokenize=tokenize, render=simulated.renderer(options.tokenizer))
    counted = simulated.run(path, reader, arms, least)
    result = prompt_replay.report(counted)
    known = simulated.measured(store, options.policies)
    speed = f"Savings rest on a speed of prefill ({assumed_text(result['assumed_speed'])})."
    assumed = [speed] if math.isinf(budget) else [speed, _room(options, budget)]
    table = simulated.table(result, console().width, known)
    _show(options, result, table, [*simulated.NOTES, *assumed])
    if options.plot is not None:
        draw(simulated.points(counted), path.name, options.plot)


def _room(options: _Options, budget: float) -> str:
    """What `--row-bytes` assumed, where a budget makes that count."""
    row_bytes = options.row_bytes or _ROW_BYTES
    assumed = ", as of Qwen2.5-7B; --row-bytes DIR: of your model" if not options.row_bytes else ""
    return f"Host tier: {size(int(budget))}; a token: {row_bytes:,} bytes{assumed}"


def _show(options: _Options, result: Any, table: Table, notes: Sequence[str]) -> None:
    if options.json is not None:
        write_json(options.json, result)
    if options.json != STDOUT:
        out = console()
        out.print(table)
        for note in notes:
            out.print(note, style="dim")


def _size(text: str, name: str) -> int:
    budget = parse_size(text, name)
    if budget < 0:
        raise ConfigError(f"{name}: a budget is negative")
    return budget


def _row_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    from kvshare_store.simulate.model_rows import row_bytes_of  # noqa: PLC0415 - NumPy

    if Path(text).is_dir():
        return row_bytes_of(Path(text))
    nbytes = parse_size(text, "--row-bytes")
    if nbytes < 1:
        raise ConfigError("--row-bytes: a token takes at least a byte")
    return nbytes


def _seconds(text: str) -> float | None:
    if text == "never":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"--settle {text}: write seconds, or never")
    return seconds
