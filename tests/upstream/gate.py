"""What makes a run of vLLM's tests with our classes a failure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What one arm did."""

    outcomes: dict[str, str] = field(default_factory=dict)
    """Test → passed, failed or skipped."""
    calls: dict[str, int] = field(default_factory=dict)
    """Method of ours → how often the tests called it."""

    @classmethod
    def read(cls, file: Path) -> Result:
        """What the plugin wrote; nothing if pytest ended before it could."""
        return cls(**json.loads(file.read_text())) if file.exists() else cls()


def differences(control: Result, ours: Result) -> list[str]:
    """Tests that end otherwise with our schedulers than with vLLM's, one line each."""
    tests = sorted(control.outcomes.keys() | ours.outcomes.keys())
    pairs = ((control.outcomes.get(test), ours.outcomes.get(test)) for test in tests)
    return [
        f"{test}: {theirs or 'not run'} with vLLM's schedulers, {how or 'not run'} with ours"
        for test, (theirs, how) in zip(tests, pairs, strict=True)
        if theirs != how
    ]


def not_passed(result: Result, known: dict[str, int]) -> list[str]:
    """Test files of which another number of tests passed than is known, one line each."""
    passed = Counter(
        test.partition("::")[0] for test, how in result.outcomes.items() if how == "passed"
    )
    return [
        f"{file}: {passed[file]} tests passed with vLLM's schedulers, expected {known.get(file, 0)}"
        for file in sorted(known.keys() | passed.keys())
        if passed[file] != known.get(file, 0)
    ]


def not_called(result: Result, methods: list[str]) -> list[str]:
    """Methods of ours that no test reached, one line each: nothing is shown then."""
    return [f"the tests never called {name}" for name in methods if not result.calls.get(name)]
