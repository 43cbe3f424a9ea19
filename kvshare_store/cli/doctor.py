"""`kvshare doctor`: whether this machine can run a store, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    SetOption,
    console,
    plain_table,
    print_json,
    sourced,
)

STYLES = {"ok": "green", "note": "dim", "warning": "yellow", "wrong": "red"}


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Check versions, permissions, memory, limits, disk, vLLM's flags and the daemon.

    With `connect`: the way to that daemon, certificates and role, in place of home, memory and
    disk.

    Changes nothing. The exit code is 1 if something is wrong; warnings leave it at 0.
    """
    from kvshare_store.cli import checkup  # noqa: PLC0415 - seconds, not for --help

    found = [finding._asdict() for finding in checkup.findings(sourced(home, config, set_))]
    wrong = any(finding["state"] == "wrong" for finding in found)
    if json:
        print_json({"well": not wrong, "findings": found})
        return int(wrong)
    out = console()
    out.print(findings_table(found))
    out.print(f"\n{verdict(found)}", style="red" if wrong else "green")
    return int(wrong)


def findings_table(found: Sequence[dict[str, Any]]) -> Table:
    """A line for each finding, with what to do about it."""
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in found:
        style = STYLES[finding["state"]]
        text = Text(finding["found"])
        if finding["advice"]:
            text.append(f"\n→ {finding['advice']}", style=style)
        table.add_row(Text(finding["state"], style), finding["what"], text)
    return table


def verdict(found: Sequence[dict[str, Any]]) -> str:
    """A summary in one line."""
    wrong, doubtful = (
        sum(finding["state"] == state for finding in found) for state in ("wrong", "warning")
    )
    return f"{wrong} wrong, {doubtful} to look at" if wrong or doubtful else "all is well"
