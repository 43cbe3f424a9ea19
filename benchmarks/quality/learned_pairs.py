"""The choices that need no family, on `agreement`'s pairs: the half that nothing was chosen on."""

from __future__ import annotations

from itertools import chain

from benchmarks.harness.result import Options, Result
from benchmarks.methods.base import donor_of
from benchmarks.methods.compared import engine_for
from benchmarks.quality.agreement_pairs import similar_pairs
from benchmarks.quality.learned import FLOOR_EVERY, draw, noise_floor, pair_scores, result_of
from benchmarks.quality.learned_grid import windows
from benchmarks.quality.learned_table import rows
from kvshare_store.cli.progress import track

__all__ = ["draw", "measure"]


def measure(options: Options) -> Result:
    """A pair has one earlier prompt and no family, so what is learned is the oracle's alone."""
    engine, chat, model = engine_for(options)
    pairs = similar_pairs(options.data, chat, "report", options.size(100, 4))
    newline = chat.tokens("\n")[0]
    found = list(
        chain.from_iterable(
            pair_scores(engine, [pair], donor_of(engine, pair.donor), None, newline, "pairs")
            for pair in track(pairs, "Filling and forcing")
        )
    )
    floor = noise_floor(options, engine, pairs[::FLOOR_EVERY])
    table = rows("pairs", found, [method.name for method in windows()], floor, options.seed)
    n = {"pairs": len(pairs)}
    named = f"{model}, fp32, transformers"
    return result_of(options, "learned-pairs", named, n, floor, table, found)
