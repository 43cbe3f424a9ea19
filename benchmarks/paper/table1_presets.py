"""Table 1 for prefix caching and the presets alone: fewer than half the answers a prompt."""

from __future__ import annotations

from benchmarks.harness.result import Options, Result
from benchmarks.methods.compared import presets
from benchmarks.paper.table1 import draw, scored

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """The presets' answers to every task, scored."""
    return scored(options, "table1-presets", options.size(50, 2), presets)
