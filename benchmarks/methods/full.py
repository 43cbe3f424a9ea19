"""Full prefill: what every other method is held against."""

from __future__ import annotations

from collections.abc import Sequence

from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import Donor, Prefilled, full_compute


class Full:
    """Computes every row, whatever there is to reuse."""

    name = "full"

    def prefill(
        self, engine: RowEngine, prompt: Sequence[int], donors: Sequence[Donor]
    ) -> Prefilled:
        """The prompt, computed in one forward."""
        return full_compute(engine, prompt)
