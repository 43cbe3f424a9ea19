"""`kvshare gc`: collect garbage now."""

from __future__ import annotations

from typing import Any

import typer

from kvshare_store.cli.common import (
    ConfigOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    answering,
    configured,
    print_json,
)
from kvshare_store.readable import many, size


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Remove unused blocks, expired prompts and old versions of the catalogue.

    A daemon does this by itself every gc_seconds. If none runs, the home is opened here, and
    nothing is merged.
    """
    from kvshare_store.daemon.protocol import Collect  # noqa: PLC0415 - seconds, not for --help

    with answering(configured(home, config)) as ask:
        found = ask(Collect(dry_run))
    if json:
        print_json(found)
    else:
        typer.echo(sentence(found, dry_run=dry_run))


def sentence(found: dict[str, Any], *, dry_run: bool) -> str:
    """What was removed, or would be, in one line."""
    return (
        f"{'Would collect' if dry_run else 'Collected'} {many(found['blocks'], 'block')} "
        f"({size(found['bytes'])}), {many(found['nodes'], 'node')}, "
        f"{many(found['versions'], 'old version')} of the catalogue; "
        f"{'would merge' if dry_run else 'merged'} {many(found['merged'], 'node')}."
    )
