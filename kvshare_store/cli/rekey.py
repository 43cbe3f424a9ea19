"""`kvshare rekey`: another master key."""

from __future__ import annotations

from typing import Annotated

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, configured
from kvshare_store.errors import ConfigError

NewKeyOption = Annotated[
    str,
    typer.Option(
        "--new-key", metavar="SOURCE", help="file:PATH, env:NAME or command:ARGV, as in settings."
    ),
]
AloneOption = Annotated[
    bool,
    typer.Option("--alone", help="No other machine uses the shared catalogue at this time."),
]


def command(
    new_key: NewKeyOption,
    home: HomeOption = None,
    config: ConfigOption = None,
    alone: AloneOption = False,
) -> None:
    """Put another key in place of encryption_key.

    The store must be stopped. Stored rows stay as they are; only what the key itself seals is
    written anew. After a crash, run it again.
    """
    from kvshare_store.cli.upkeep import refuse_without_store  # noqa: PLC0415 - seconds, not for --help
    from kvshare_store.maintenance.rekey import rekey  # noqa: PLC0415

    chosen = configured(home, config)
    if chosen.connect:
        raise ConfigError("rekey works on a home of this machine: unset connect")
    refuse_without_store(chosen)
    done = rekey(chosen, new_key, alone=alone)
    others = "; the others had it" if done.sealed < done.namespaces else ""
    sealed = f"{done.sealed:,} of {done.namespaces:,} namespaces"
    typer.echo(f"Sealed {sealed} with the new key{others}.")
    typer.echo(f"Set encryption_key to {new_key} before the next start.")
