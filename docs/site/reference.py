"""The page of every command and option, made from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from kvshare_store.cli.main import app


def commands() -> dict[str, Any]:
    """Every command by its whole name: `stats`, `vllm serve`."""
    return dict(_below(typer.main.get_command(app), ""))


def _below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child, found in children.items():
        yield from _below(found, f"{name} {child}".strip())


def options(command: Any) -> set[str]:
    """All spellings of a command's options."""
    return {"--help", "-h"} | {
        spelling
        for parameter in command.params
        if parameter.param_type_name == "option"
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    }


def page() -> str:
    """Markdown."""
    head = "# Every option\n\nMade from the commands. What they are for: [commands](commands.md).\n"
    return "\n".join([head, *(_section(name, it) for name, it in commands().items())])


def _section(name: str, command: Any) -> str:
    usage = [_argument(parameter) for parameter in command.params if _is_argument(parameter)]
    lines = [f"## kvshare {name}", "", "```", " ".join(["kvshare", name, *usage]), "```", ""]
    lines += [_plain(command.help or ""), ""]
    if command.params:
        lines += ["| option | what |", "|---|---|", *map(_row, command.params), ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if _is_argument(parameter):
        names = _argument(parameter)
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if not parameter.is_flag:
            names += f" {parameter.metavar or 'VALUE'}"
    text = _plain(parameter.help or "").replace("|", "\\|")
    default = parameter.default
    if default and isinstance(default, str | int | float) and not isinstance(default, bool):
        text += f" Default: `{default}`."
    return f"| `{names}` | {text} |"


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return f"{name}…" if parameter.nargs == -1 else name


def _plain(text: str) -> str:
    """Words alone: placeholders such as <FIELD> are no HTML."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\b", ""))
    return "\n\n".join(" ".join(part.split()) for part in paragraphs).replace("<", "&lt;")
