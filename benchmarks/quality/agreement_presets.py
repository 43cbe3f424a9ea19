"""The presets alone, on the half of the pairs that is reported: minutes, where the frontier takes
an hour."""

from __future__ import annotations

from benchmarks.harness.result import Options, Result
from benchmarks.quality.agreement import draw, frontier

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """What each preset reuses and how far from full compute it is."""
    n = options.size(300, 4)
    return frontier(options, "report", name="agreement-presets", n=n, lineup="presets")
