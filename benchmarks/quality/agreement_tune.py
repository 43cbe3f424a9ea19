"""The wide grid on the other half of the pairs: where the presets' parameters come from."""

from __future__ import annotations

from benchmarks.harness.result import Options, Result
from benchmarks.quality.agreement import draw, frontier
from benchmarks.quality.agreement_grid import Lineup

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """More settings on fewer pairs; nothing of this half is reported as an achievement."""
    lineup: Lineup = "short" if options.short else "wide"
    n = options.size(100, 4)
    return frontier(options, "tune", name="agreement-tune", n=n, lineup=lineup)
