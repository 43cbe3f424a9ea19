"""What to recompute, learned: is it better than a window after each edit? On families of prompts.

Three ideas beside the policies' windows: positions that full compute of a family's earlier prompts
showed to depend on its edits (as a second look would); later recurrences of rare tokens of what is
computed; the first tokens of each passage. `oracle` choices know full compute of the very prompt:
no store does, and where they do not help, nothing learned will.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.families import EARLIER, KINDS, Family, families
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.base import Donor, donor_of, generate
from benchmarks.methods.compared import engine_for
from benchmarks.methods.dependence import (
    Dependence,
    computed_and_attended,
    dependence,
    learned,
)
from benchmarks.quality.agreement import by_method, mean
from benchmarks.quality.agreement_pairs import SimilarPair, Split
from benchmarks.quality.agreement_scores import CONTINUATION, Score, compared, floors
from benchmarks.quality.learned_grid import Known, Lineup, methods, windows
from benchmarks.quality.learned_table import COLUMNS, LESS, MORE, rows, verdicts
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR_EVERY = 4
"""The noise floor is computed on every fourth prompt."""
_REORDERED = ("reordered", "passages")
"""Kinds whose passages come in another order each time."""
_BY_KIND = (
    "kvshare balanced",
    "learned attended 10% + window 8",
    "lexical 4 + 2 x edit",
    "starts 8 + 2 x edit",
)
"""What the table has for each kind of family."""


def measure(options: Options) -> Result:
    """The half that nothing was chosen on."""
    return on_families(options, "report", "learned", options.size(2, 1), "report")


def on_families(options: Options, split: Split, name: str, each: int, lineup: Lineup) -> Result:
    """Every method on `each` families of every kind."""
    engine, chat, model = engine_for(options)
    drawn = families(options.data, chat, split, each, options.seed)
    lineup = "short" if options.short else lineup
    newline = chat.tokens("\n")[0]
    found = list(
        chain.from_iterable(
            family_scores(engine, family, newline, lineup)
            for family in track(drawn, "Learning and forcing")
        )
    )
    asked = [one for family in drawn for one in asked_of(family)]
    floor = noise_floor(options, engine, asked[::FLOOR_EVERY])
    ours = [method.name for method in windows()]
    table = rows("families", found, ours, floor, options.seed)
    if not options.short:
        reordered = [one for one in found if one.pair.startswith(_REORDERED)]
        table += rows("in another order", reordered, ours, floor, options.seed)
        for kind in KINDS:
            kept = [one for one in found if one.pair.startswith(kind)]
            of_kind = rows(kind, kept, ours, floor, options.seed)
            table += [line for line in of_kind if line[1] in _BY_KIND]
    n = {"families": len(drawn), "prompts": len(asked), "earlier prompts of each family": EARLIER}
    return result_of(options, name, f"{model}, fp32, transformers", n, floor, table, found)


def asked_of(family: Family) -> list[SimilarPair]:
    """The prompts of a family; a number behind its name is their id."""
    return [
        SimilarPair(f"{family.name}.{at}", prompt, family.donor, 1.0)
        for at, prompt in enumerate(family.asked)
    ]


def noise_floor(options: Options, engine: RowEngine, few: Sequence[SimilarPair]) -> float:
    """Mean KL of full compute in bf16 against itself in two chunks."""
    rough, _, _ = engine_for(options, torch.bfloat16)
    found = chain.from_iterable(track(floors(engine, rough, few), "Noise floor", total=len(few)))
    return mean(by_method(found)["bf16 twice"], "kl")


def family_scores(
    engine: RowEngine, family: Family, newline: int, lineup: Lineup
) -> Iterator[Score]:
    """Every method on the prompts of a family, after what its earlier prompts taught."""
    donor = donor_of(engine, family.donor)
    taught = learned(engine, donor, family.earlier)
    yield from pair_scores(engine, asked_of(family), donor, taught, newline, lineup)


def pair_scores(
    engine: RowEngine,
    pairs: Sequence[SimilarPair],
    donor: Donor,
    taught: Dependence | None,
    newline: int,
    lineup: Lineup,
) -> Iterator[Score]:
    """Every method on prompts of one donor."""
    computed = [computed_and_attended(engine, pair.prompt) for pair in pairs]
    answers = generate(engine, [full for full, _ in computed], CONTINUATION)
    for pair, (full, attention), answer in zip(pairs, computed, answers, strict=True):
        own, _ = dependence(engine, pair.prompt, donor, full, attention)
        ours = methods(Known(pair.prompt, pair.donor, newline, own, taught), lineup)
        filled = [method.prefill(engine, pair.prompt, [donor]) for method in ours]
        yield from compared(engine, pair, full, answer, [one.name for one in ours], filled)


def result_of(
    options: Options,
    name: str,
    model: str,
    n: dict[str, int],
    floor: float,
    table: list[list[Cell]],
    found: Sequence[Score],
) -> Result:
    """The table and what it says of the criterion."""
    sets = [line for line in table if line[0] not in KINDS]
    reached = verdicts(sets, [method.name for method in windows()])
    return Result(
        name=name,
        title=f"Learned choice of what to recompute: KL over {CONTINUATION} forced tokens",
        n=n,
        seed=options.seed,
        model=model,
        noise_floor=f"mean KL over 16 tokens: bf16 twice {floor:.5f}",
        columns=COLUMNS,
        rows=table,
        paper="not measured",
        notes=[*_NOTES, f"Choices whose means reach it: {'; '.join(reached) or 'none'}."],
        series={
            "scores": [[*one] for one in found],
            "floor": floor,
        },
    )


_NOTES = [
    "Families: one template, its slots filled anew each time, made of WMT19, SAMSum and MuSiQue. "
    + " ".join(f"`{kind}`: {(make.__doc__ or '').strip()}" for kind, make in KINDS.items())
    + " Halves have no text in common.",
    "`learned`: by the mean over the earlier prompts of how far each of the donor's rows was off; "
    "`deviation` of K and V, `attended` of V times the attention of the prompt's last 16 tokens. A "
    "share is of what the windows leave; `to 0.3` takes as few as leave 0.3 in sum. `oracle`: the "
    "same by this prompt's own full compute. `lexical 8`: 8 tokens from each later recurrence of a "
    "rare token of edits and their windows. `starts 8`: the first 8 tokens of each passage.",
    "`points more` and `times` are against the best of the windows, interpolated (the logarithm of "
    "the KL is linear in the reuse); empty beyond them. Resamples are of whole families. To adopt "
    f"a choice takes {MORE:.0f} points more or {LESS:g} times the KL.",
]


def draw(result: Result) -> Figure:
    """Tokens reused against KL: the windows as a line, the choices as marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    first = result.rows[0][0]
    ours = [line for line in result.rows if line[0] == first]
    names = {method.name for method in windows()}
    frontier = sorted((line[2], line[3]) for line in ours if line[1] in names)
    axes.plot(*zip(*frontier, strict=True), "o-", color="black", label="windows alone")
    for mark, kind in zip("s^vD", ("learned", "lexical", "starts", "oracle"), strict=True):
        points = [(line[2], line[3]) for line in ours if str(line[1]).startswith(kind)]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color="black",
                      markerfacecolor="white", label=kind)  # fmt: skip
    axes.axhline(result.series["floor"], color="black", linestyle="--", linewidth=1,
                 label="noise: bf16 twice")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("share of tokens reused (all prompts together)")
    axes.set_ylabel("KL to full compute, mean over 16 tokens (nats)")
    axes.set_title(result.title, fontsize=10)
    axes.legend(fontsize=8)
    return figure
