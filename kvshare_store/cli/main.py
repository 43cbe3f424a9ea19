"""`kvshare`: registers every command and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from kvshare_store.cli import (
    check,
    clear,
    completion,
    config,
    diff,
    doctor,
    evict,
    explain,
    gc,
    log,
    ls,
    move,
    pin,
    publish,
    purge,
    quality,
    rekey,
    salt,
    serve,
    show,
    simulate,
    stats,
    stop,
    top,
)
from kvshare_store.config import FIELDS_HELP
from kvshare_store.errors import KVShareError
from kvshare_store.observability.version import version
from kvshare_store.readable import one_line

_ENGINES = {"vllm": "kvshare_connectors.vllm.launch"}
"""Modules whose `app` has the commands of an engine, by name: the store imports no engine."""

app = typer.Typer(
    name="kvshare",
    help="Reuse the KV cache of similar, not only identical, prompts.",
    epilog="Settings: command line, then KVSHARE_<FIELD>, then the YAML file, then defaults.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True)
def group(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the release and exit.")
    ] = False,
) -> None:
    """Reuse the KV cache of similar, not only identical, prompts."""
    if show_version:
        typer.echo(f"kvshare {version()}")
        raise typer.Exit


app.command("serve", epilog=FIELDS_HELP)(serve.command)
for engine, module in _ENGINES.items():
    app.add_typer(import_module(module).app, name=engine)
app.command("stats")(stats.command)
app.command("ls")(ls.command)
app.command("show")(show.command)
app.command("diff")(diff.command)
app.command("explain")(explain.command)
app.command("log")(log.command)
app.command("quality")(quality.command)
app.command("pin")(pin.pin)
app.command("unpin")(pin.unpin)
app.command("publish", context_settings=publish.VLLM_ARGUMENTS)(publish.command)
app.command("evict")(evict.command)
app.command("gc")(gc.command)
app.command("check")(check.command)
app.command("purge")(purge.command)
app.command("rekey")(rekey.command)
app.command("clear")(clear.command)
app.command("config", epilog=FIELDS_HELP)(config.command)
app.command("doctor", epilog=FIELDS_HELP)(doctor.command)
app.command("export")(move.export)
app.command("import")(move.import_)
app.command("salt")(salt.command)
app.command("simulate")(simulate.command)
app.command("stop")(stop.command)
app.command("top")(top.command)
app.command("completion")(completion.command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command. An error becomes one line on standard error and an exit code."""
    completion.prepare()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # signs that it cannot show become `?`
            stream.reconfigure(errors="replace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given or ["--help"], prog_name="kvshare", standalone_mode=False)
        if sys.stdout is not None:  # it is None where the shell has closed it
            sys.stdout.flush()  # not only at exit, which would show a traceback
    except KVShareError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        _fail(f"{_said(error, given)} (see {_help_of(given)})", 2)
    except typer.Abort:
        _fail("stopped, nothing was changed", 1)
    except OSError:  # those of the store are `KVShareError`s
        refusal = _refusal()
        if refusal is None:
            raise
        if isinstance(refusal, BrokenPipeError):  # whoever read has read enough
            sys.exit(1)
        _fail(f"cannot write the answer: {refusal.strerror}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _refusal() -> OSError | None:
    """Why standard output takes nothing, not even an empty line; None if it does."""
    try:
        if sys.stdout is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            sys.stdout.close()  # or what is in its buffer would be tried once more at exit
        return error
    return None


def _fail(message: str, code: int) -> NoReturn:
    # it may name what strangers wrote: a field of an archive, a path
    typer.echo(f"kvshare: {one_line(message)}", err=True)
    sys.exit(code)


def _said(error: typer.TyperException, given: Sequence[str]) -> str:
    """The message, and of an option without its value what that may be."""
    message, option = error.format_message(), getattr(error, "option_name", None)
    command = typer.main.get_command(app).commands.get(given[0]) if given else None  # type: ignore[attr-defined]
    wanted = [one.metavar for one in getattr(command, "params", ()) if option in one.opts]
    return f"{message.removesuffix('.')}: {wanted[0]}" if wanted and wanted[0] else message


def _help_of(given: Sequence[str]) -> str:
    names = [command.name for command in app.registered_commands]
    return f"kvshare {given[0]} --help" if given and given[0] in names else "kvshare --help"


if __name__ == "__main__":
    main()
