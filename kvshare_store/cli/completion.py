"""`kvshare completion SHELL`: what a shell needs to complete commands and options."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer import completion as shells

VARIABLE = "_KVSHARE_COMPLETE"
"""The shell sets it when it asks."""


class Shell(StrEnum):
    """Shells that can be taught."""

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
    """Answer the shell's questions, if it is the shell that asks."""
    if VARIABLE in os.environ:
        shells.completion_init()  # type: ignore[attr-defined]
