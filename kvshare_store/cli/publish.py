"""`kvshare publish`: compute the operator's templates once, for every tenant to build on."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from kvshare_store.cli.common import ConfigOption, HomeOption, SetOption, parse_settings
from kvshare_store.config import LONGEST_POOL
from kvshare_store.errors import ConfigError

_FILLING = "kvshare_connectors.vllm.templates"
"""Loaded by its name: the store imports no engine."""
VLLM_ARGUMENTS = {"ignore_unknown_options": True, "allow_extra_args": True}

FileArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="JSONL, gzip or not: lines with `messages`, `prompt` or `tokens`."
    ),
]
PoolOption = Annotated[
    str, typer.Option("--pool", metavar="NAME", help="Where to keep them.", show_default=False)
]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="As engines name it.", show_default=False)
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="Also remove what the pool has and FILE has not.")
]


def command(
    context: typer.Context,
    file: FileArgument,
    pool: PoolOption,
    model: ModelOption,
    replace: ReplaceOption = False,
    home: HomeOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Compute the templates of FILE and keep them in a pool that all tenants may build on.

    Starts an engine of its own for that. Every other option goes to vLLM: give those that your
    engines have too (--dtype, --kv-cache-dtype, --quantization, ...). Engines with the setting
    `pools` read what is there; no request can write to it.
    """
    if not pool.strip() or "," in pool or len(pool) > LONGEST_POOL:
        raise ConfigError(f"a pool's name has 1 to {LONGEST_POOL} characters, none of them a comma")
    given = parse_settings(settings or ())
    if home is not None:
        given["home"] = home
    if config is not None:
        given["config"] = str(config)
    done = import_module(_FILLING).publish(
        file,
        pool.strip(),
        given,
        ["--model", model, *context.args],
        replace=replace,
        progress=lambda told: typer.echo(told, err=True),
    )
    typer.echo(
        f"Pool {pool.strip()}: {done.stored:,} templates stored, {done.known:,} were there, "
        f"{done.removed:,} removed; {done.tokens:,} tokens in all."
    )
