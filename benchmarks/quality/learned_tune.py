"""The same on the other half of the families: where `learned`'s settings come from."""

from __future__ import annotations

from benchmarks.harness.result import Options, Result
from benchmarks.quality.learned import draw, on_families

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """More settings on fewer families; nothing of this half is reported as an achievement."""
    return on_families(options, "tune", "learned-tune", options.size(4, 1), "tune")
