"""How contract tests are written: as coroutines that get the tier, or the remote, under test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol


class _Runner(Protocol):
    """A class of contract tests."""

    def run(
        self, folder: Path, scenario: Callable[[Any], Awaitable[None]], /, **options: Any
    ) -> None:
        """Run a scenario against what is made for it in `folder`."""


def scenario(**options: Any) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Makes a test of a coroutine: the `run` of its class calls it with what is under test, and
    takes the `options`. Whatever else the coroutine asks for is a fixture or a parameter."""

    def made_of(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        me, _, *others = inspect.signature(test).parameters.values()
        folder = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        more = [one for one in others if one.name != folder.name]

        @functools.wraps(test)
        def run(self: _Runner, tmp_path: Path, **given: Any) -> None:
            if len(more) < len(others):
                given[folder.name] = tmp_path
            self.run(tmp_path, lambda tested: test(self, tested, **given), **options)

        run.__signature__ = inspect.Signature([me, folder, *more])  # type: ignore[attr-defined]
        return run

    return made_of
