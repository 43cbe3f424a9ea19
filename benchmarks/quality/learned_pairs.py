"""The same on `agreement`'s pairs: the half that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.harness.result import Options, Result
from benchmarks.methods.base import donor_of
from benchmarks.methods.compared import engine_for
from benchmarks.methods.dependence import learned
from benchmarks.quality.agreement_pairs import SimilarPair, similar_pairs
from benchmarks.quality.agreement_scores import Score
from benchmarks.quality.learned import FLOOR_EVERY, draw, noise_floor, pair_scores, result_of
from benchmarks.quality.learned_grid import Lineup, windows
from benchmarks.quality.learned_table import rows
from kvshare_store.cli.progress import track

__all__ = ["draw", "measure"]

REUSED, TIMES = 0.75, 5.0
"""What a learned choice was to reach on these pairs: share reused, multiple of the floor."""


def measure(options: Options) -> Result:
    """What is learned comes from other earlier prompts that are as similar, where there are some;
    elsewhere such a choice is `balanced`."""
    engine, chat, model = engine_for(options)
    pairs = similar_pairs(options.data, chat, "report", options.size(100, 4))
    newline = chat.tokens("\n")[0]
    lineup: Lineup = "short" if options.short else "pairs"
    found = list(
        chain.from_iterable(
            _scores(engine, pair, newline, lineup) for pair in track(pairs, "Filling and forcing")
        )
    )
    floor = noise_floor(options, engine, pairs[::FLOOR_EVERY])
    table = rows("pairs", found, [method.name for method in windows()], floor, options.seed)
    taught = sum(bool(pair.earlier) for pair in pairs)
    n = {"pairs": len(pairs), "of them with other earlier prompts": taught}
    named = f"{model}, fp32, transformers"
    result = result_of(options, "learned-pairs", named, n, floor, table, found)
    result.targets = [goal(table)]
    return result


def _scores(engine: RowEngine, pair: SimilarPair, newline: int, lineup: Lineup) -> Iterator[Score]:
    donor = donor_of(engine, pair.donor)
    taught = learned(engine, donor, pair.earlier) if pair.earlier else None
    return pair_scores(engine, [pair], donor, taught, newline, lineup)


def goal(table: Sequence[Sequence[Any]]) -> tuple[str, str, bool]:
    """The most that a learned choice reuses within five times the floor."""
    near = [line for line in table if str(line[1]).startswith("learned") and line[5] <= TIMES]
    best = max(near, key=lambda line: line[2], default=None)
    said = f"{best[1]}: {best[2]:.1%} at {best[5]:.1f} x" if best else "none is so near"
    return (
        f"a learned choice: >= {REUSED:.0%} of tokens reused at KL 16 <= {TIMES:.0f} x noise floor",
        said,
        best is not None and best[2] >= REUSED,
    )
