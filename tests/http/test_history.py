"""What happened step by step, and how it is drawn."""

from __future__ import annotations

from typing import Any

from kvshare_store.http.chart import HEIGHT, WIDTH, chart
from kvshare_store.http.history import COUNTERS, STEP_S, History


def stats(
    exact: int, edited: int = 0, recomputed: int = 0, host: int = 0, cached: int = 0
) -> dict[str, Any]:
    return {
        "tokens_reused_exact": exact,
        "tokens_reused_continued": 0,
        "tokens_reused_edited": edited,
        "tokens_engine_cached": cached,
        "tokens_recomputed": recomputed,
        "bytes_loaded": 10 * exact,
        "bytes_stored": 0,
        "tiers": {"host": {"bytes": host}},
    }


def history(*samples: dict[str, Any]) -> History:
    moments = iter(range(len(samples)))
    made = History(lambda: STEP_S * next(moments))
    for sample in samples:
        made.take(sample)
    return made


def test_steps_are_differences() -> None:
    made = history(stats(100, host=5), stats(130, 7, 9, host=25), stats(130, 7, 4, host=20))
    first, second = made.steps()
    assert (first.start, first.stop, first.tokens) == (0.0, STEP_S, (30, 0, 7, 0, 9))
    assert (first.reused, first.loaded) == (37, 300)
    assert second.tokens == (0, 0, 0, 0, 0), "a counter that fell back is no step"
    assert made.moved() == {"host": 15}


def test_steps_are_made_wider_until_few_are_left() -> None:
    made = history(*(stats(at * at) for at in range(101)))
    steps = made.steps(10)
    assert len(steps) == 10
    assert steps[-1].stop == 100 * STEP_S, "the newest always shows"
    assert sum(step.reused for step in steps) == 100 * 100
    assert {step.stop - step.start for step in steps} == {10 * STEP_S}
    assert len(made.steps(1000)) == 100


def test_nothing_is_drawn_before_anything_could_change() -> None:
    assert chart(history().steps()) is None
    assert chart(history(stats(5)).steps()) is None
    assert history().moved() == {}


def test_an_hour_is_kept() -> None:
    made = history(*(stats(at) for at in range(1000)))
    steps = made.steps(10_000)
    assert len(steps) * STEP_S == 3600


def test_what_the_engines_own_cache_had_is_a_part_of_the_whole() -> None:
    drawn = chart(history(stats(0), stats(30, recomputed=20, cached=50)).steps())
    assert drawn is not None
    assert (drawn.reused, drawn.tokens) == (30, 100)
    assert drawn.kinds == {"exact": 30, "continued": 0, "edited": 0, "cached": 50, "recomputed": 20}
    assert [bar.kind for bar in drawn.bars] == ["exact", "cached", "recomputed"]


def test_bars_stand_on_each_other_and_fill_the_height() -> None:
    drawn = chart(history(stats(0), stats(30, 20, 50), stats(30, 20, 75)).steps())
    assert drawn is not None
    assert (drawn.highest, drawn.tokens, drawn.reused) == (100, 125, 50)
    assert sum(drawn.kinds.values()) == drawn.tokens
    first = [bar for bar in drawn.bars if bar.x < WIDTH / 2]
    assert [bar.kind for bar in first] == ["exact", "edited", "recomputed"]
    assert [bar.height for bar in first] == [HEIGHT * part for part in (0.3, 0.2, 0.5)]
    bottom = float(HEIGHT)
    for bar in first:
        assert bar.y + bar.height == bottom
        bottom = bar.y
    assert bottom == 0.0
    (last,) = [bar for bar in drawn.bars if bar.x > WIDTH / 2]
    assert (last.kind, last.height) == ("recomputed", HEIGHT / 4)
    assert last.x + last.width <= WIDTH
    assert {bar.kind for bar in drawn.bars} <= set(COUNTERS)
