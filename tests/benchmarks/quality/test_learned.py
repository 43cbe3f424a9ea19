"""What to recompute, learned: how a choice is held against the windows' frontier."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.families import Family
from benchmarks.harness.result import Options
from benchmarks.methods.dependence import Dependence
from benchmarks.quality.agreement_scores import Score
from benchmarks.quality.learned import draw, family_scores, result_of
from benchmarks.quality.learned_grid import Known, Lineup, methods, windows
from benchmarks.quality.learned_pairs import goal
from benchmarks.quality.learned_table import (
    Beside,
    Point,
    adopted,
    beside,
    family_of,
    resampled,
    rows,
    samples_of,
    verdicts,
)
from tests.transformers.tiny import prompt_of

FRONTIER = [Point(0.9, 0.1), Point(0.8, 0.01), Point(0.7, 0.02), Point(0.6, 0.001)]


def scored(method: str, *points: tuple[float, float]) -> list[Score]:
    return [
        Score(method, f"kind {at // 2}.{at % 2}", 100, round(100 * reused), True, 0.1, kl, 1.0)
        for at, (reused, kl) in enumerate(points)
    ]


def test_a_point_is_held_against_the_best_of_the_frontier() -> None:
    assert beside(FRONTIER, Point(0.8, 0.01)) == pytest.approx((0, 1))
    # between 0.8 and 0.6, since the point at 0.7 is no better than the one at 0.8
    assert beside(FRONTIER, Point(0.7, 10**-2.5)) == pytest.approx((0, 1))
    assert beside(FRONTIER, Point(0.85, 0.01)) == pytest.approx((5, 10**-0.5))
    assert beside(FRONTIER, Point(0.7, 0.01)) == pytest.approx((-10, 10**0.5))


def test_beyond_the_frontier_nothing_is_said() -> None:
    assert beside(FRONTIER, Point(0.95, 0.05)).times is None
    assert beside(FRONTIER, Point(0.7, 0.0001)).more is None
    assert beside(FRONTIER, Point(0.95, 0.5)) == (None, None)


def test_either_half_of_the_criterion_is_enough() -> None:
    assert adopted(Beside(3.0, 0.9))
    assert adopted(Beside(None, 0.7))
    assert not adopted(Beside(2.9, 0.71))
    assert not adopted(Beside(None, None))


def test_resamples_are_of_whole_families() -> None:
    assert [family_of(name) for name in ("header 3.1", "abc#0")] == ["header 3", "abc#0"]
    frontier = list(samples_of([*scored("w8", (0.9, 0.4), (0.9, 0.6), (0.9, 0.2), (0.9, 0.3)),
                                *scored("w64", (0.5, 0.04), (0.5, 0.06), (0.5, 0.02), (0.5, 0.03))
                                ]).values())  # fmt: skip
    one = samples_of(scored("c", (0.9, 0.2), (0.9, 0.3), (0.9, 0.2), (0.9, 0.3)))["c"]
    found = set(np.round(resampled(frontier, one, ["a", "a", "b", "b"], 0), 6))
    assert found == {0.5, 1.0, round(0.25 / 0.375, 6)}


def test_the_table_says_which_choice_reaches_the_criterion() -> None:
    scores = [
        *scored("w8", (0.9, 0.4), (0.9, 0.6)),
        *scored("w64", (0.5, 0.04), (0.5, 0.06)),
        *scored("learned", (0.9, 0.1), (0.9, 0.3)),
        *scored("oracle", (0.9, 0.1), (0.9, 0.1)),
        *scored("lexical", (0.9, 0.5), (0.9, 0.5)),
    ]
    found = rows("families", scores, ["w8", "w64"], 0.01, 0)
    by_name = {line[1]: line for line in found}
    assert by_name["w8"][2:] == pytest.approx([0.9, 0.5, 0.1 / 2**0.5, 50, None, None, None])
    assert by_name["learned"][7] == pytest.approx(0.4)
    assert by_name["learned"][8] == "0.40 to 0.40"
    assert verdicts(found, ["w8", "w64"]) == [
        "learned (families): 90.0% reused at 20.0 x floor, times 0.40 to 0.40"
    ]


def test_the_goal_is_met_by_reuse_within_a_multiple_of_the_floor() -> None:
    def line(method: str, reused: float, times: float) -> list[object]:
        return ["pairs", method, reused, 0.1, 0.1, times, None, None, None]

    table = [line("learned a", 0.8, 5.1), line("learned b", 0.7, 5.0), line("oracle", 0.9, 1.0)]
    assert goal(table)[1:] == ("learned b: 70.0% at 5.0 x", False)
    assert goal([*table, line("learned c", 0.75, 4.0)])[2]
    assert goal(table[:1])[1:] == ("none is so near", False)


@pytest.mark.parametrize("lineup", get_args(Lineup))
def test_methods_have_names_of_their_own(lineup: Lineup) -> None:
    off = Dependence(np.zeros(4, np.float32), np.zeros(4, np.float32))
    names = [one.name for one in methods(Known([1] * 4, [1] * 4, 9, off, None), lineup)]
    assert len(names) == len(set(names))
    assert {one.name for one in windows()} < set(names)


def test_a_family_teaches_and_is_scored(llama: RowEngine) -> None:
    base = prompt_of(60)
    members = [(*base[:10], at, *base[11:]) for at in range(1, 5)]
    family = Family("header", "header 0", members[0], (members[1],), (members[2], members[3]))
    found = list(family_scores(llama, family, 5, "short"))
    assert {one.pair for one in found} == {"header 0.0", "header 0.1"}
    by_method = samples_of(found)
    windowed, chosen = (by_method[name].point() for name in
                        ("kvshare balanced", "learned attended 10% + balanced"))  # fmt: skip
    assert chosen.reused < windowed.reused
    assert by_method["kvshare aggressive"].point().kl > 1e-4
    table = rows("families", found, [one.name for one in windows()], 0.01, 0)
    result = result_of(Options(data=Path()), "learned", "m", {}, 0.01, table, found)
    assert len(draw(result).axes[0].lines) == 4  # windows, two ideas, the floor
