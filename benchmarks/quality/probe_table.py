"""What edit probes showed, as a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.compared import BF16, FULL, NOISE
from benchmarks.quality.probe_prompts import QUESTIONS, Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAITHFUL, AGGRESSIVE = "kvshare faithful", "kvshare aggressive"
CELLS = [(question, distance) for question in QUESTIONS for distance in ("near", "far")]
READING = (
    "How to read it: models of 8B parameters follow the old value in derived probes when only the "
    "edit is recomputed (the paper above). Where `aggressive` gives the new value here as well, "
    "the probe cannot tell a careful policy from a careless one; perhaps so small a model looks "
    "the value up in the edited sentence, whose rows are fresh. `recovered` shows how much of the "
    "old value is left."
)
ENOUGH = 10
"""Probes that the model must be able to do before greedy answers are counted."""


@dataclass
class Seen:
    """What one arm made of one probe."""

    margin: float
    """Log-probability of the new value minus that of the old one."""
    said_new: bool
    """Whether the most likely token is the new value's first."""
    reused: float
    """Share of the prompt's tokens."""


@dataclass
class Probed:
    """A probe with what full compute says to the request (oracle) and to the donor (stale)."""

    probe: Probe
    oracle: Seen
    stale: Seen
    said_old: bool
    """Whether full compute answers the donor with the old value."""
    arms: dict[str, Seen] = field(default_factory=dict)

    @property
    def can(self) -> bool:
        """Whether full compute gives both prompts their own value as the greedy answer."""
        return self.oracle.said_new and self.said_old

    @property
    def leans(self) -> bool:
        """Whether full compute at least finds each prompt's own value the likelier of the two."""
        return self.oracle.margin > 0 > self.stale.margin


@dataclass
class Summary:
    """One arm on some probes."""

    n: int
    new: float
    """Share answered with the new value."""
    recovered: float
    """Margin recovered: sum of (method - stale) by sum of (oracle - stale)."""
    reused: float

    @classmethod
    def of(cls, found: Sequence[Probed], arm: str, says_new: Callable[[Seen], bool]) -> Summary:
        """Over probes that have this arm; there must be one."""
        seen = [one.arms[arm] for one in found]
        gained = sum(s.margin - one.stale.margin for s, one in zip(seen, found, strict=True))
        whole = sum(one.oracle.margin - one.stale.margin for one in found)
        return cls(
            len(seen),
            sum(map(says_new, seen)) / len(seen),
            gained / whole,
            sum(s.reused for s in seen) / len(seen),
        )


def said_new(seen: Seen) -> bool:
    """The greedy answer is the new value."""
    return seen.said_new


def leans_new(seen: Seen) -> bool:
    """The new value is likelier than the old one."""
    return seen.margin > 0


def counted(found: Sequence[Probed]) -> tuple[list[Probed], Callable[[Seen], bool], str]:
    """Probes the model can do, and what counts as the new value: said, or at least likelier."""
    able = [one for one in found if one.can and one.leans]
    if all(sum(_is(one, cell) for one in able) >= ENOUGH for cell in CELLS):
        return able, said_new, "answered with the new value (greedy)"
    leaning = [one for one in found if one.leans]
    return leaning, leans_new, "new value likelier than the old one"


def _is(one: Probed, cell: tuple[str, str]) -> bool:
    return (one.probe.question, one.probe.distance) == cell


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's); of a share of 1 its upper end is 1, not almost."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return round(middle - half, 9), round(middle + half, 9)


def table(found: list[Probed], tuned: list[Probed], options: Options, model: str) -> Result:
    able, says_new, how = counted(found)
    summaries = {
        arm: {cell: Summary.of(some, arm, says_new) for cell in CELLS if (some := _of(able, cell))}
        for arm in (able[0].arms if able else [])
    }
    series = {
        arm: {f"{q} {d}": [s.new, s.recovered, s.n] for (q, d), s in by_cell.items()}
        for arm, by_cell in summaries.items()
    }
    columns = ["method", *(f"{question} {distance}" for question, distance in CELLS)]
    columns += ["not direct, same length", "other length", "tokens reused"]
    rows: list[list[Cell]] = []
    for arm, by_cell in summaries.items():
        row: list[Cell] = [arm]
        row += [_both(by_cell[cell]) if cell in by_cell else None for cell in CELLS]
        for same in (True, False):
            some = [
                one
                for one in able
                if one.probe.same_length == same and one.probe.question != "direct"
            ]
            row.append(_both(Summary.of(some, arm, says_new)) if some else None)
        row.append(Summary.of(able, arm, said_new).reused)
        rows.append(row)
    sizes = {f"{q} {d}, of {len(_of(found, (q, d)))}": len(_of(able, (q, d))) for q, d in CELLS}
    tune_able = [one for one in tuned if (one.can or says_new is leans_new) and one.leans]
    return Result(
        name="probes",
        title=f"Edit probes: {how}, of those that full compute can do",
        n=sizes,
        seed=options.seed,
        model=f"{model}, float32",
        noise_floor=_noise(summaries),
        columns=columns,
        rows=rows,
        paper=(
            "arXiv 2609.17983, 8B models, derived: a contiguous window of 32 after the edit "
            "recovers 0.94-1.01 of the margin near and 0.01-0.09 at 250 tokens; CacheBlend "
            "0.01-0.24 near; every policy 0.98-1.00 of direct probes."
        ),
        notes=_notes(able, found, tune_able, says_new),
        targets=targets_of(series),
        series=series,
    )


def _of(found: Sequence[Probed], cell: tuple[str, str]) -> list[Probed]:
    return [one for one in found if _is(one, cell)]


def _both(summary: Summary) -> str:
    return f"{summary.new:.2f} / {summary.recovered:.2f}"


def _noise(summaries: dict[str, dict[tuple[str, str], Summary]]) -> str:
    parts = []
    for arm in (NOISE, BF16):
        shares = [f"{s.new:.2f}" for s in summaries.get(arm, {}).values()]
        parts.append(f"{arm}: {' / '.join(shares) or 'not measured'}")
    return "share with the new value when full compute is run again: " + "; ".join(parts)


def targets_of(series: dict[str, dict[str, list[float]]]) -> list[tuple[str, str, bool]]:
    """`faithful` where text depends on the edit, held against the rounding of bf16.

    Too few probes reach nothing. What placeholders alone give stands beside it: where that is as
    good, the probe cannot tell policies apart.
    """
    targets = []
    for question, distance in CELLS:
        cell = f"{question} {distance}"
        arms = [series.get(arm, {}).get(cell) for arm in (FAITHFUL, BF16, AGGRESSIVE)]
        if question == "direct" or None in arms:
            continue
        (share, _, n), (noise, *_), (bare, *_) = arms
        low, high = wilson(share, int(n))
        few = "" if n >= ENOUGH else f", too few to tell (fewer than {ENOUGH})"
        targets.append(
            (
                f"{question} probes, {distance}: faithful gives the new value as often as full",
                f"{share:.2f} [{low:.2f}, {high:.2f}] beside {noise:.2f} in bf16, n = {n}{few}; "
                f"placeholders only: {bare:.2f}",
                high >= noise and not few,
            )
        )
    return targets


def _notes(
    able: list[Probed],
    found: list[Probed],
    tuned: list[Probed],
    says_new: Callable[[Seen], bool],
) -> list[str]:
    both = sum(one.can for one in found)
    notes = [
        f"Of {len(found)} probes, full compute answers {both} with the right value on both the "
        f"request and the donor, and finds the right value the likelier one on "
        f"{sum(one.leans for one in found)}. Counted: {len(able)}.",
        "The donor is the whole prompt with the old value and the same question; the answer's "
        "beginning is given, so the next token is the value's first. Stale is the donor's own "
        "answer. Cells: share with the new value / margin recovered, a ratio of sums: "
        "(method - stale) / (oracle - stale).",
        "Rival: derived, with the old value also in the request, said of somebody else.",
        READING,
    ]
    for arm in tuned[0].arms if tuned else ():
        shares = []
        for cell in CELLS[2:]:
            if some := _of(tuned, cell):
                s = Summary.of(some, arm, says_new)
                shares.append(f"{cell[0]} {cell[1]} {_both(s)} (n {s.n}), {s.reused:.0%} reused")
        notes.append(f"Tune half, {arm}: {'; '.join(shares)}.")
    return notes


def draw(result: Result) -> Figure:
    """Share answered with the new value by method, one panel for a kind of probe."""
    from matplotlib.figure import Figure

    arms = [arm for arm in result.series if arm not in (FULL, NOISE)]
    figure = Figure(figsize=(14, 0.32 * len(arms) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(CELLS), sharey=True)
    for axis, (question, distance) in zip(axes, CELLS, strict=True):
        for at, arm in enumerate(arms):
            point = result.series[arm].get(f"{question} {distance}")
            if point is None:
                continue
            share, recovered, n = point
            low, high = wilson(share, n)
            axis.plot([low, high], [at, at], color="0.4", linewidth=1.2)
            axis.plot(share, at, "o", color="black", markersize=5)
            axis.plot(recovered, at, "D", color="black", markerfacecolor="white", markersize=5)
            axis.set_title(f"{question}, {distance}, n = {n}", fontsize=10)
        axis.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xlim(-0.15, 1.15)
    axes[0].set_yticks(range(len(arms)), arms, fontsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("filled: share with the new value (95 %); open: margin recovered", fontsize=9)
    return figure
