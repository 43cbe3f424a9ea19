"""`kvshare publish`: compute the operator's templates once, for every tenant to build on."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare_store.cli.common import (
    ConfigOption,
    HomeOption,
    JsonOption,
    SetOption,
    parse_settings,
    print_json,
)
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
    json: JsonOption = False,
) -> None:
    """Compute the templates of FILE and keep them in a pool that all tenants may build on.

    Starts an engine of its own for that. Every other option goes to vLLM: give those that your
    engines have too (--dtype, --kv-cache-dtype, --quantization, ...). Engines with the setting
    `pools` read what is there; no request can write to it.
    """
    if not pool.strip() or "," in pool or len(pool) > LONGEST_POOL:
        raise ConfigError(f"a pool's name has 1 to {LONGEST_POOL} characters, none of them a comma")
    pool = pool.strip()
    done = import_module(_FILLING).publish(
        file,
        pool,
        _given(home, config, settings),
        ["--model", model, *context.args],
        replace=replace,
        progress=lambda told: typer.echo(told, err=True),
    )
    if json:
        templates = [template._asdict() for template in done.templates]
        print_json({"pool": pool, "templates": templates, "removed": done.removed})
    else:
        typer.echo(_said(pool, done))


def _given(home: str | None, config: Path | None, settings: Sequence[str] | None) -> dict[str, str]:
    given = parse_settings(settings or ())
    if home is not None:
        given["home"] = home
    if config is not None:
        given["config"] = str(config)
    return given


def _said(pool: str, done: Any) -> str:
    """`done`: the connector's `Published`."""
    stored = sum(template.stored for template in done.templates)
    tokens = sum(template.tokens for template in done.templates)
    return (
        f"Pool {pool}: {stored:,} templates stored, {len(done.templates) - stored:,} were there, "
        f"{done.removed:,} removed; {tokens:,} tokens in all."
    )
