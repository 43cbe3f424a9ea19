"""Agreement with full compute: the frontier of tokens reused against KL, over similar prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.compared import delimiters_of, engine_for
from benchmarks.quality.agreement_grid import Lineup, grid
from benchmarks.quality.agreement_pairs import SHARE, SimilarPair, Split, similar_pairs
from benchmarks.quality.agreement_scores import CONTINUATION, Score, floors, scores
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR_EVERY = 3
"""The noise floor is computed on every third pair: bf16 is slow on most CPUs."""
LONG = 256
"""Least length of a long prompt in tokens."""
COLUMNS = [
    "method",
    "reused",
    "reused, pooled",
    "of alignable",
    "first token same",
    "KL first",
    "KL 16",
    "± (s.e.)",
    "agree 16",
    "x bf16 twice",
    "x bf16/fp32",
]


def measure(options: Options) -> Result:
    """The frontier on the half of the pairs that no parameter was chosen on."""
    lineup: Lineup = "short" if options.short else "frontier"
    return frontier(options, "report", name="agreement", n=options.size(300, 4), lineup=lineup)


def frontier(options: Options, split: Split, *, name: str, n: int, lineup: Lineup) -> Result:
    """All methods of the grid on `n` pairs of a half."""
    exact, chat, model = engine_for(options)
    pairs = similar_pairs(options.data, chat, split, n)
    methods = grid(delimiters_of(exact), lineup)
    found = list(
        chain.from_iterable(
            track(scores(exact, pairs, methods), "Filling and forcing", total=len(pairs))
        )
    )
    few = pairs[::FLOOR_EVERY]
    rough, _, _ = engine_for(options, torch.bfloat16)
    noise = list(
        chain.from_iterable(track(floors(exact, rough, few), "Noise floor", total=len(few)))
    )
    return result_of(options, model, pairs, found, noise, name=name, split=split)


def result_of(
    options: Options,
    model: str,
    pairs: Sequence[SimilarPair],
    found: Sequence[Score],
    noise: Sequence[Score],
    *,
    name: str,
    split: Split,
) -> Result:
    """The table: a row for each method, and the two noise floors above them."""
    floor = {key: mean(kept, "kl") for key, kept in by_method(noise).items()}
    alignable = {pair.id: pair.alignable for pair in pairs}
    rows = [row(kept, floor, alignable) for kept in by_method([*noise, *found]).values()]
    floor_pairs = len(noise) // max(1, len(floor))
    return Result(
        name=name,
        title=f"Agreement with full compute over {CONTINUATION} forced tokens ({split} half)",
        n={"pairs": len(pairs), "pairs for the noise floor": floor_pairs},
        seed=options.seed,
        model=f"{model}, fp32, transformers",
        noise_floor="mean KL over 16 tokens: "
        + ", ".join(f"{key} {value:.4f}" for key, value in floor.items()),
        columns=COLUMNS,
        rows=rows,
        paper="The paper reports no such number, only BLEU and Rouge-L of answers (Table 1).",
        notes=[*notes(pairs), _long_prompts(found, floor)],
        targets=targets(rows) if split == "report" else [],
        series={"floor": floor, "per_pair": per_pair(found)},
    )


def by_method(found: Iterable[Score]) -> dict[str, list[Score]]:
    """Scores of each method, in the order in which methods first appear."""
    kept: dict[str, list[Score]] = {}
    for one in found:
        kept.setdefault(one.method, []).append(one)
    return kept


def mean(kept: Sequence[Score], field: str) -> float:
    """Mean over pairs."""
    return float(np.mean([getattr(one, field) for one in kept]))


def row(kept: Sequence[Score], floor: dict[str, float], alignable: dict[str, float]) -> list[Cell]:
    """One line of the table; both denominators of the KL are there, and both of the reuse."""
    shares = [one.reused / one.tokens for one in kept]
    tokens = sum(one.tokens for one in kept)
    reusable = sum(one.tokens * alignable[one.pair] for one in kept)
    reused = sum(one.reused for one in kept)
    kl = mean(kept, "kl")
    return [
        kept[0].method,
        float(np.mean(shares)),
        reused / tokens,
        reused / reusable,
        mean(kept, "first_same"),
        mean(kept, "kl_first"),
        kl,
        float(np.std([one.kl for one in kept]) / len(kept) ** 0.5),
        mean(kept, "agree"),
        *(kl / floor[key] for key in ("bf16 twice", "bf16 against fp32")),
    ]


def targets(rows: Sequence[Sequence[Cell]]) -> list[tuple[str, str, bool]]:
    """What the presets were to reach on the half that is reported. "Reused" is judged by the tokens
    of all prompts together."""
    found = []
    for preset, times, share in (("balanced", 5.0, 0.75), ("faithful", 2.0, 0.0)):
        line: Any = next((r for r in rows if r[0] == f"kvshare {preset}"), None)
        if line is None:
            continue
        cells = dict(zip(COLUMNS, line, strict=True))
        pooled, ratio = cells["reused, pooled"], cells["x bf16 twice"]
        least = f" at >= {share:.0%} of tokens reused" if share else ""
        found.append(
            (
                f"{preset}: KL 16 <= {times:.0f} x noise floor{least}",
                f"{ratio:.1f} x bf16 twice, {cells['x bf16/fp32']:.1f} x bf16/fp32,"
                f" {pooled:.1%} of tokens reused (mean over prompts {cells['reused']:.1%})",
                bool(pooled >= share and ratio <= times),
            )
        )
    return found


def notes(pairs: Sequence[SimilarPair]) -> list[str]:
    """What a reader must know of the sample and the columns."""
    lengths = [len(pair.prompt) for pair in pairs]
    return [
        f"Pairs: human turns of ShareGPT, each as a prompt of its own in the chat template, with an"
        f" earlier one that covers >= {SHARE:.0%} of its tokens in runs of >= 8, not identical and"
        " edited somewhere (>= 16 aligned tokens after the first edit). Mean aligned"
        f" {np.mean([pair.alignable for pair in pairs]):.1%}; {min(lengths)} to {max(lengths)}"
        f" tokens, median {np.median(lengths):.0f}.",
        "Methods in fp32 against full compute in fp32, one donor. 'reused' is the mean of each"
        " prompt's share, 'pooled' counts tokens of all prompts together, 'of alignable' is against"
        " tokens in aligned runs of >= 8 (methods that keep shorter runs may exceed 1).",
        "'x bf16 twice': KL 16 as a multiple of full compute in bf16 against itself with the prompt"
        " in two chunks; 'x bf16/fp32': of bf16 against fp32.",
        "CacheBlend, EPIC and DHD choose among the rows that our alignment keeps; DHD is our"
        " reading of an abstract. Their 'reused' is a mean over the layers.",
        "'prefix' is the store's own policy `exact`: the common prefix, if it has a run of >= 16"
        " tokens.",
        "Why a preset is where it is, and the same numbers counted in other ways:"
        " [policies](../design/policies.md#what-the-other-half-said),"
        " [agreement-weights](#agreement-weights).",
    ]


def _long_prompts(found: Sequence[Score], floor: dict[str, float]) -> str:
    """The presets on the longer prompts alone, where a window is a small part."""
    parts = []
    for name, kept in by_method(found).items():
        long = [one for one in kept if one.tokens >= LONG]
        if name.startswith("kvshare") and long:
            reused = sum(one.reused for one in long) / sum(one.tokens for one in long)
            ratio = mean(long, "kl") / floor["bf16 twice"]
            parts.append(f"{name.removeprefix('kvshare ')} {reused:.1%} reused at {ratio:.1f} x")
    count = len({one.pair for one in found if one.tokens >= LONG})
    return (
        f"Prompts of {LONG} tokens and more alone (n = {count}), x bf16 twice: "
        f"{'; '.join(parts) or 'none'}."
    )


def per_pair(found: Sequence[Score]) -> dict[str, list[list[float]]]:
    """For each method the share reused and the KL of every pair."""
    return {
        name: [[round(one.reused / one.tokens, 4), round(one.kl, 6)] for one in kept]
        for name, kept in by_method(found).items()
    }


_MARKS = {
    "kvshare": ("*", "KVShare presets"),
    "window": ("o", "window after edits"),
    "cacheblend": ("s", "CacheBlend (HKVD)"),
    "epic": ("^", "EPIC (LegoLink)"),
    "dhd": ("v", "DHD, our reading"),
    "blend": ("D", "window + HKVD"),
}


_LABELS = 20
"""With more points than this, only presets and the frontier get labels, which would overlap."""


def draw(result: Result) -> Figure:
    """Tokens reused against KL, with both noise floors as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5))
    axes = figure.subplots()
    seen: set[str] = set()
    points = _points(result)
    best = best_points(points) if len(points) > _LABELS else set(points)
    for name, (reused, kl) in points.items():
        kind = _kind(name)
        mark, label = _MARKS[kind]
        preset = kind == "kvshare"
        axes.plot(
            [reused], [kl], mark, color="black", markerfacecolor="black" if preset else "white",
            markersize=8, label=None if kind in seen else label, zorder=3 if preset else 2,
        )  # fmt: skip
        seen.add(kind)
        if preset or name in best:
            short = name.removeprefix("kvshare ").removeprefix("window ").removeprefix(f"{kind} ")
            axes.annotate(
                short, (reused, kl), fontsize=6, xytext=(4, 3), textcoords="offset points"
            )
    for (key, value), style in zip(result.series["floor"].items(), ("--", ":"), strict=True):
        axes.axhline(value, color="black", linestyle=style, linewidth=1, label=f"noise: {key}")
    axes.set_yscale("log")
    axes.set_xlabel("share of tokens reused (all prompts together)")
    axes.set_ylabel("KL to full compute, mean over 16 tokens (nats)")
    axes.set_title(result.title, fontsize=10)
    axes.legend(fontsize=7)
    return figure


def _kind(name: str) -> str:
    return "blend" if "+ hkvd" in name else name.split()[0]


def _points(result: Result) -> dict[str, tuple[float, float]]:
    """Share reused and KL of every method that is drawn."""
    found = {}
    for line in result.rows:
        name, reused, kl = str(line[0]), line[2], line[6]
        drawn = _kind(name) in _MARKS and isinstance(reused, float) and isinstance(kl, float)
        if drawn and kl > 0:
            found[name] = (reused, kl)
    return found


def best_points(points: dict[str, tuple[float, float]]) -> set[str]:
    """Methods to which no other is preferable in both, the first of equal ones alone."""
    best: set[str] = set()
    least = float("inf")
    for name, (_, kl) in sorted(points.items(), key=lambda item: (-item[1][0], item[1][1])):
        if kl < least:
            best.add(name)
            least = kl
    return best
