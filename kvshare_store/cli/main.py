"""`kvshare`: registers every command and turns errors into exit codes."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

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


def register(name: str, command: Callable[..., Any], **more: Any) -> None:
    """Add a command. Its help is its docstring, of which a paragraph is broken where the terminal
    ends, not where the source does."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(each.split()) for each in paragraphs)
    app.command(name, help=text, **more)(command)


register("serve", serve.command, epilog=FIELDS_HELP)
for engine, module in _ENGINES.items():
    app.add_typer(import_module(module).app, name=engine)
register("stats", stats.command)
register("ls", ls.command)
register("show", show.command)
register("diff", diff.command)
register("explain", explain.command)
register("log", log.command)
register("quality", quality.command)
register("pin", pin.pin)
register("unpin", pin.unpin)
register("publish", publish.command, context_settings=publish.VLLM_ARGUMENTS)
register("evict", evict.command)
register("gc", gc.command)
register("check", check.command)
register("purge", purge.command)
register("rekey", rekey.command)
register("clear", clear.command)
register("config", config.command, epilog=FIELDS_HELP)
register("doctor", doctor.command, epilog=FIELDS_HELP)
register("export", move.export)
register("import", move.import_)
register("salt", salt.command)
register("simulate", simulate.command)
register("stop", stop.command)
register("top", top.command)
register("completion", completion.command)


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
