"""What the commands share: options, the configuration made from them, and the daemon's client."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from kvshare_store.config import Settings, StoreConfig, load_settings
from kvshare_store.errors import ConfigError

if TYPE_CHECKING:
    from kvshare_store.cli.upkeep import Ask

_PIPE = 10_000
"""Cells of a line that no terminal shows: nothing is cut or broken."""

HomeOption = Annotated[
    str | None,
    typer.Option("--home", metavar="DIR", help="Folder that holds the store.", show_default=False),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file with settings.", show_default=False),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="One setting; may be repeated. Wins over environment and file.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go.")]
NODE_HELP = "Id of a node, or a unique beginning of it."
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help=NODE_HELP)]
NamespaceOption = Annotated[
    str, typer.Option("--namespace", metavar="DIGEST", help="Digest, or a unique beginning of it.")
]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="NAME", help="Prompts of this tenant.")
]


def configured(
    home: str | None, file: Path | None, settings: Sequence[str] | None = None
) -> StoreConfig:
    """The configuration that the options ask for; `--home` is short for `--set home=`."""
    return sourced(home, file, settings).config


def sourced(home: str | None, file: Path | None, settings: Sequence[str] | None = None) -> Settings:
    """As `configured`, and where each value came from."""
    explicit = parse_settings(settings or ())
    if home is not None:
        explicit["home"] = home
    return load_settings(explicit, file=file)


def place(config: StoreConfig) -> str:
    """Where the daemon is that a command asks, for people: an address, or a home."""
    return config.connect or str(config.home_path)


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`field=value` texts as a dictionary; the last one wins."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals):
            raise ConfigError(f"--set {setting}: write --set field=value")
        parsed[name.strip()] = value
    return parsed


def answering(config: StoreConfig, *, new: bool = False) -> AbstractContextManager[Ask]:
    """What answers messages for a home; see `upkeep.chores`."""
    from kvshare_store.cli import upkeep  # noqa: PLC0415 - seconds, not for --help

    return upkeep.chores(config, new=new)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """A JSON document on a line of its own, one of several."""
    typer.echo(json.dumps(value))


def plain_table(**look: Any) -> Table:
    """A table without a frame; `look`: what rich's `Table` takes."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, **look)


def add_numbers(table: Table, *heads: str) -> None:
    """Add columns whose cells stand at their right."""
    for head in heads:
        table.add_column(head, justify="right")


def console() -> Console:
    """The console for standard output. Into a pipe lines are as long as what they say, unless
    `COLUMNS` wants them shorter."""
    made = Console(highlight=False, markup=False, emoji=False)
    if not (made.is_terminal or os.environ.get("COLUMNS")):
        made.width = _PIPE
    return made


class Indented:
    """Text some cells from the left, broken at blanks. (Rich's `Padding` fills each line up with
    blanks, to the end of the longest one or of the terminal.)"""

    def __init__(self, text: Text, cells: int = 2) -> None:
        self._text, self._indent = text, " " * cells

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._text.wrap(console, options.max_width - len(self._indent)):
            yield Text(self._indent).append_text(line)
