"""Runs `kvshare` commands in the process of the test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kvshare_store.cli.main import main

Result = tuple[int, str, str]


def run(*arguments: str | Path, answer: str = "", columns: str = "120") -> Result:
    """Run one command in this process; returns exit code, standard output and standard error.
    `answer`: what the user types; `columns`: width of the terminal."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", io.StringIO(answer)),
        mock.patch.dict(os.environ, COLUMNS=columns),
        pytest.raises(SystemExit) as end,
    ):
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code, out.getvalue(), err.getvalue()


def one_line(result: Result, code: int) -> str:
    """The single line on standard error."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert err.startswith("kvshare: ")
    assert err.count("\n") == 1
    return err


def ok(*arguments: str | Path) -> str:
    """Standard output of a command that succeeds and says nothing else."""
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    return out


def as_json(*arguments: str | Path) -> Any:
    """The answer of a command with `--json`."""
    return json.loads(ok(*arguments, "--json"))
