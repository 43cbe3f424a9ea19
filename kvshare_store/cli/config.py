"""`kvshare config`: the values in effect, and where each came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rich.table import Table
from rich.text import Text

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    SetOption,
    console,
    place,
    print_json,
    sourced,
)
from kvshare_store.cli.fitting import GAP, fitted, longest_word, table_of
from kvshare_store.config import FIELDS, PER_ENGINE, Settings, unknown_variables
from kvshare_store.errors import UnavailableError
from kvshare_store.readable import printable, size

Row = dict[str, Any]

_LEAST = {"value": 20, "here": 16}
"""Columns that are broken in a narrow terminal, and the cells that they have at least: an address
with its port stays whole."""

_LEGEND = "from: who has said so. here: what this command's own settings say, where that differs."


def command(
    home: HomeOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Show every setting: its value, and where that came from.

    If a daemon serves the home, or answers at `connect`, its values are shown; `here` is what this
    command would have used, where that differs. What is `per engine` an engine may have been
    given otherwise: its log says so when it starts.
    """
    from kvshare_store.namespace.limits import TenantLimits  # noqa: PLC0415 - NumPy, not for --help

    settings = sourced(home, config, set_)
    theirs = _running(settings)
    if theirs is None:
        TenantLimits(settings.config)  # a daemon would read that file, and refuse to start
    rows = effective(settings, theirs)
    ignored = unknown_variables(os.environ)
    if json:
        print_json({"served": theirs is not None, "settings": rows, "ignored": ignored})
        return
    out = console()
    nobody = "no daemon answers" if settings.config.connect else "no daemon runs"
    served = "as its daemon runs" if theirs is not None else nobody
    out.print(f"{place(settings.config)}: {served}\n", soft_wrap=True)
    out.print(settings_table(rows, out.width))
    if any("here" in row for row in rows):
        out.print(_LEGEND, style="dim")
    for name in ignored:
        out.print(f"{name} in the environment is no setting and is ignored", style="yellow")


def _running(settings: Settings) -> Mapping[str, Any] | None:
    from kvshare_store.cli import remote  # noqa: PLC0415 - seconds, not for --help

    try:
        with remote.connected(settings.config) as client:
            return remote.settings(client)
    except UnavailableError:
        return None


def effective(settings: Settings, theirs: Mapping[str, Any] | None) -> Sequence[Row]:
    """A row for each field: `value` and `source`, and `here` where a daemon has another value."""
    rows: list[Row] = []
    same = "" if settings.config.connect else "home"  # one path may be written in two ways
    for name in FIELDS:
        here = _shown(getattr(settings.config, name))
        row: Row = {"name": name, "value": here, "source": settings.sources[name]}
        if theirs is not None and name != same and name in theirs:
            value = _shown(theirs[name])
            if value != here:
                row = {"name": name, "value": value, "source": "daemon", "here": here}
        rows.append(row)
    return rows


def _shown(value: Any) -> Any:
    """A value without the password that a URL may contain."""
    if not (isinstance(value, str) and "://" in value):
        return value
    parts = urlsplit(value)
    if parts.password is None:
        return value
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}"))


def settings_table(rows: Sequence[Row], width: int) -> Table:
    """A line for each setting, in `width` cells."""
    columns = {
        "setting": [Text(row["name"]) for row in rows],
        "value": [Text(_words(row["name"], row["value"])) for row in rows],
        "from": [Text(_source(row)) for row in rows],
    }
    if any("here" in row for row in rows):
        here = (_words(row["name"], row["here"]) if "here" in row else "" for row in rows)
        columns["here"] = [Text(words, "yellow") for words in here]
    for row, value, source in zip(rows, columns["value"], columns["from"], strict=True):
        if row["source"] == "default":
            value.style = source.style = "dim"
    others = max(map(len, FIELDS)) + sum(_LEAST[name] + GAP for name in columns if name in _LEAST)
    # names of settings stay whole, however long the path of a file is
    least = _LEAST | {"from": min(longest_word(columns["from"]), width - others - GAP)}
    return table_of(columns, fitted(columns, width, least, ()), _look)


def _look(name: str) -> dict[str, Any]:
    first = name == "setting"
    return {"style": "cyan" if first else "", "no_wrap": first, "overflow": "fold"}


def _source(row: Row) -> str:
    mark = "; per engine" if row["name"] in PER_ENGINE else ""
    return f"{row['source']}{mark}"


def _words(name: str, value: Any) -> str:
    if value is None:
        return "the policy's own"
    if value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.15g}"
    return size(value) if value and name.endswith("_bytes") else printable(str(value))
