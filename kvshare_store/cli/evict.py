"""`kvshare evict`: remove some stored prompts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvshare_store.bounded import pieces
from kvshare_store.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    TenantOption,
    YesOption,
    answering,
    configured,
    print_json,
)
from kvshare_store.errors import ConfigError, NodeError
from kvshare_store.errors.wording import short
from kvshare_store.plan import LONGEST_S
from kvshare_store.readable import many

if TYPE_CHECKING:
    from kvshare_store.cli.upkeep import Ask

_AGE = re.compile(r"^(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)$")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_AT_ONCE = 1000
"""Nodes in one message, which has room for a limited number of them."""

NodesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NODE]...", help="Ids, or unique beginnings of them."),
]
OlderOption = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Stored longer ago than 90s, 10min, 6h, 7d."),
]
PolicyOption = Annotated[
    str,
    typer.Option("--policy", metavar="NAME", help="Edited prompts that were made under a policy."),
]


def command(
    nodes: NodesArgument = None,
    tenant: TenantOption = None,
    older_than: OlderOption = None,
    policy: PolicyOption = "",
    home: HomeOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Remove the stored prompts for which all conditions hold; pinned ones stay.

    Rows that no other prompt uses go with them. To leave no trace of a tenant, use purge.
    """
    from kvshare_store.daemon.protocol import Evict  # noqa: PLC0415 - seconds, not for --help

    seconds = None if older_than is None else parse_age(older_than)
    chosen = configured(home, config)
    ids = tuple(nodes or ())
    with answering(chosen) as ask:
        found = ask(Evict(ids, tenant, seconds, policy, dry_run=True))
        if not dry_run and found["nodes"]:
            if not yes:
                typer.confirm(f"Remove {counted(found)}?", abort=True, err=True)
            found = forgotten(ask, found["nodes"])
    if json:
        print_json(found)
        return
    if dry_run:
        for node in found["nodes"]:
            typer.echo(short(node))
    typer.echo(f"{'Would forget' if dry_run else 'Forgot'} {counted(found)}.")


def forgotten(ask: Ask, nodes: Sequence[str]) -> dict[str, Any]:
    """Forget exactly what was shown and confirmed; some may have gone by themselves meanwhile."""
    from kvshare_store.daemon.protocol import Evict  # noqa: PLC0415 - seconds, not for --help

    done: dict[str, Any] = {"nodes": [], "tokens": 0, "pinned": []}
    for some in pieces(nodes, _AT_ONCE):
        try:
            found = [ask(Evict(tuple(some)))]
        except NodeError:  # then none of them was forgotten
            found = []
            for node in some:
                with contextlib.suppress(NodeError):
                    found.append(ask(Evict((node,))))
        for one in found:
            for name, value in one.items():
                done[name] += value
    return done


def parse_age(text: str) -> float:
    """Seconds of `90s`, `10min`, `6h` or `7d`; `ConfigError` for anything else."""
    match = _AGE.match(text.strip())
    if match is None:
        raise ConfigError(f"--older-than {text}: write an age such as 90s, 10min, 6h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > LONGEST_S:
        raise ConfigError(f"--older-than {text}: no prompt is older than {LONGEST_S:.0f}s")
    return seconds


def counted(found: dict[str, Any]) -> str:
    """The number of prompts and their bytes, in words."""
    pinned = len(found["pinned"])
    stay = f"; {pinned:,} pinned {'stays' if pinned == 1 else 'stay'}" if pinned else ""
    return f"{many(len(found['nodes']), 'node')} ({many(found['tokens'], 'token')}{stay})"
