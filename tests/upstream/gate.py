"""Decides whether a run of vLLM's tests with our classes is a failure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """The result of one arm."""

    outcomes: dict[str, str] = field(default_factory=dict)
    """Test → passed, failed or skipped."""
    calls: dict[str, int] = field(default_factory=dict)
    """Method of ours → how often the tests called it."""

    @classmethod
    def read(cls, file: Path) -> Result:
        """What the plugin wrote; nothing if pytest ended before it could."""
        return cls(**json.loads(file.read_text())) if file.exists() else cls()


def differences(control: Result, ours: Result, refused: Collection[str] = frozenset()) -> list[str]:
    """Tests that end differently with our schedulers than with vLLM's, one line each.

    `refused`: tests that ask for what KVShare refuses; they must fail with ours.
    """
    tests = sorted(control.outcomes.keys() | ours.outcomes.keys())
    pairs = (
        ("failed" if test in refused else control.outcomes.get(test), ours.outcomes.get(test))
        for test in tests
    )
    return [
        f"{test}: expected {theirs or 'not run'}, {how or 'not run'} with our schedulers"
        for test, (theirs, how) in zip(tests, pairs, strict=True)
        if theirs != how
    ]


def missing(result: Result, known: dict[str, int], counted: Collection[str]) -> list[str]:
    """Test files of which fewer tests ended in a `counted` way than are known, one line each."""
    ended = Counter(
        test.partition("::")[0] for test, how in result.outcomes.items() if how in counted
    )
    return [
        f"{file}: {ended[file]} tests {' or '.join(counted)}, expected {count}"
        for file, count in known.items()
        if ended[file] < count
    ]


def not_called(result: Result, methods: list[str]) -> list[str]:
    """Methods of ours that no test reached, one line each: the run proves nothing about them."""
    return [f"the tests never called {name}" for name in methods if not result.calls.get(name)]
