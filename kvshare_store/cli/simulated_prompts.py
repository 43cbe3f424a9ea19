"""`kvshare simulate --prompts`: what recorded prompts would have found, by reuse policy."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvshare_store.cli.common import plain_table
from kvshare_store.cli.progress import progress
from kvshare_store.cli.simulated import Points
from kvshare_store.errors import ConfigError
from kvshare_store.readable import share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvshare_store.simulate.prompt_replay import Arm, Counted
    from kvshare_store.simulate.prompts import Reader


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


def table(result: dict[str, Any]) -> Table:
    """A line for prefix caching and for each policy."""
    title = f"{result['requests']:,} requests, {result['tokens']:,} tokens"
    caption = "ratio: to compute, prefix caching = 1; median, 90 %: tokens to compute a request"
    found = plain_table(title=title, caption=caption, padding=(0, 1, 0, 0))
    found.add_column("reused", style="cyan", no_wrap=True)
    for column in ("exact", "continued", "edited", "to compute", "ratio", "median", "90 %"):
        found.add_column(column, justify="right", no_wrap=True)
    arms = {name: arm for name, arm in result.items() if isinstance(arm, dict)}
    first = next(iter(arms.values()))["to_compute"]
    for name, arm in arms.items():
        left, kinds = arm["to_compute"], arm["by_kind"].values()
        per_request = (arm["median_to_compute"], arm["p90_to_compute"])
        found.add_row(
            name.replace("_", " "),
            *(share(tokens, result["tokens"]) for tokens in kinds),
            f"{left:,}",
            f"{left / max(1, first):.2f}",
            *(f"{tokens:,.0f}" for tokens in per_request),
        )
    return found


def points(counted: Counted) -> Points:
    """The share of all tokens so far that each arm reused, request by request."""
    so_far = list(accumulate(counted.lengths))
    lines: Points = {}
    for name, reused in counted.reused.items():
        found = accumulate(each.tokens for each in reused)
        shares = (each / tokens for each, tokens in zip(found, so_far, strict=True))
        lines[name] = list(enumerate(shares, 1))
    return lines
