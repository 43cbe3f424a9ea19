"""A result as a measurement returns it."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.result import Result


def result(name: str, **more: Any) -> Result:
    given: dict[str, Any] = {
        "title": f"Title of {name}", "n": {"prompts": 1200}, "seed": 3, "model": "tiny",
        "noise_floor": "half a point", "columns": ["method", "share"], "rows": [["a|b", 0.12345]],
        "command": f"python -m benchmarks run {name}", "machine": "two cores", "date": "2026-01-02",
        "seconds": 61.0,
    }  # fmt: skip
    return Result(name=name, **given | more)
