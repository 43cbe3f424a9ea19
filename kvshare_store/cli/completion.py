"""`kvshare completion SHELL`: prints the script that lets a shell complete commands and options."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer import completion as shells

VARIABLE = "_KVSHARE_COMPLETE"
"""Set by the shell when it asks for completions."""


class Shell(StrEnum):
    """Supported shells."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


ShellArgument = Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]


def command(shell: ShellArgument) -> None:
    """Print the completion script of a shell.

    For bash: `eval "$(kvshare completion bash)"` in ~/.bashrc; zsh the same in ~/.zshrc; fish:
    `kvshare completion fish > ~/.config/fish/completions/kvshare.fish`.
    """
    script = shells.get_completion_script(  # type: ignore[attr-defined]
        prog_name="kvshare", complete_var=VARIABLE, shell=shell.value
    )
    typer.echo(script)


def prepare() -> None:
    """Answer the shell if it is the shell that asks."""
    if VARIABLE in os.environ:
        shells.completion_init()  # type: ignore[attr-defined]
