"""`kvshare simulate --prompts`: what recorded prompts would have found, by reuse policy."""

from __future__ import annotations

import functools
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table
from rich.text import Text

from kvshare_store.cli.fitting import Columns, fitted, no_room_for, table_of
from kvshare_store.cli.progress import progress
from kvshare_store.cli.simulated import Points
from kvshare_store.errors import ConfigError
from kvshare_store.readable import share

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kvshare_store.config import StoreConfig
    from kvshare_store.simulate.prompt_replay import Arm, Counted
    from kvshare_store.simulate.prompts import Reader, Render

FIRST_TOKENS = {
    "prefix_caching": 1.0, "exact": 1.0, "faithful": 0.99, "balanced": 0.95, "aggressive": 0.76,
}  # fmt: skip
"""How often the first token was that of full compute: docs/benchmarks/agreement.json."""
NOTES = (
    "Reused (exact, continued, edited): share of all tokens. Ratio: tokens to compute, those of "
    "prefix caching being 1. Median, 90 %: of a request.",
    "First token: how often it was that of full compute, of 300 recorded pairs of prompts and a "
    "small model, not of yours: docs/choosing.md says how to choose.",
)
_KINDS = {"exact": "exact", "continued": "con-\ntinued", "edited": "edited"}
"""Heads of the columns of a kind of reuse."""
_CHAT = "kvshare_connectors.transformers.chat"
"""Loaded by its name: the store imports no engine."""


def run(path: Path, reader: Reader, arms: Mapping[str, Arm], min_tokens: int) -> Counted:
    """Read the whole file, then serve its prompts in every arm."""
    from kvshare_store.simulate import prompt_replay, prompts  # noqa: PLC0415 - NumPy, not for --help

    try:
        with progress() as shown, path.open("rb") as file:
            reading = shown.add_task("reading", total=path.stat().st_size)
            found = []
            for prompt in prompts.read_prompts(file, reader):
                found.append(prompt)
                shown.update(reading, completed=file.tell())
            serving = shown.add_task("serving", total=len(found))
            counted = prompt_replay.replay(
                prompts.in_order(found), arms, min_tokens, lambda: shown.advance(serving)
            )
    except OSError as error:
        raise ConfigError(f"prompts {path} cannot be read: {error.strerror}") from error
    if not counted.lengths:
        raise ConfigError(f"prompts {path}: no line has {min_tokens} tokens or more")
    return counted


def renderer(tokenizer: Path) -> Render:
    """By the chat template beside a tokenizer. It is loaded for the first messages: that takes
    seconds."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent

    @functools.cache
    def loaded() -> Render:
        render: Render = import_module(_CHAT).renderer(folder)
        return render

    return lambda messages, tools: loaded()(messages, tools)


def measured(config: StoreConfig, policies: Sequence[str]) -> set[str]:
    """The arms of which `FIRST_TOKENS` speaks: policies that no setting has changed."""
    from kvshare_store.lookup.policy import PRESETS, configured_policy  # noqa: PLC0415 - NumPy

    made = {name: msgspec.structs.replace(config, policy=name) for name in policies}
    same = {name for name, one in made.items() if configured_policy(one) == PRESETS[name]}
    return {"prefix_caching", *same} & FIRST_TOKENS.keys()


def table(result: dict[str, Any], width: int, known: Collection[str]) -> Table:
    """A line for prefix caching and for each policy, in `width` cells. `known`: see `measured`."""
    arms = {name: arm for name, arm in result.items() if isinstance(arm, dict)}
    columns = _columns(arms, result["tokens"], known)
    widths = fitted(columns, width, {}, ("90 %", "median"))
    title = f"{result['requests']:,} requests, {result['tokens']:,} tokens"
    missing = no_room_for(columns, widths)
    return table_of(columns, widths, _look, title=title, caption=missing, caption_justify="left")


def _columns(arms: Mapping[str, Mapping[str, Any]], tokens: int, known: Collection[str]) -> Columns:
    first = max(1, next(iter(arms.values()))["to_compute"])
    cells = {"policy": [name.replace("_", " ") for name in arms]}
    for kind, head in _KINDS.items():
        cells[head] = [share(arm["by_kind"][kind], tokens) for arm in arms.values()]
    cells["to\ncompute"] = [f"{arm['to_compute']:,}" for arm in arms.values()]
    cells["ratio"] = [f"{arm['to_compute'] / first:.2f}" for arm in arms.values()]
    for field, head in (("median_to_compute", "median"), ("p90_to_compute", "90 %")):
        cells[head] = [f"{arm[field]:,.0f}" for arm in arms.values()]
    rates = [f"{100 * FIRST_TOKENS[name]:.0f} %" if name in known else "-" for name in arms]
    cells["first\ntoken"] = rates
    return {head: [Text(cell) for cell in column] for head, column in cells.items()}


def _look(name: str) -> dict[str, Any]:
    first = name == "policy"
    return {"style": "cyan" if first else "", "justify": "left" if first else "right"}


def points(counted: Counted) -> Points:
    """The share of all tokens so far that each arm reused, request by request."""
    so_far = list(accumulate(counted.lengths))
    lines: Points = {}
    for name, reused in counted.reused.items():
        found = accumulate(each.tokens for each in reused)
        shares = (each / tokens for each, tokens in zip(found, so_far, strict=True))
        lines[name] = list(enumerate(shares, 1))
    return lines
