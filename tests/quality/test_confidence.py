"""The limits hold at all times at once, also where what they bound drifts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvshare_store.quality.confidence import Floats, Tally, radius

STREAMS, VALUES, ERROR = 200, 3000, 0.05
COUNTS = np.arange(1, VALUES + 1)
Draws = Callable[[np.random.Generator], tuple[Floats, Floats]]


def flips(means: Floats) -> Draws:
    """Zeros and ones with these means, the same in all streams."""

    def draw(random: np.random.Generator) -> tuple[Floats, Floats]:
        wide = np.broadcast_to(means, (STREAMS, VALUES))
        return (random.random(wide.shape) < wide).astype(float), wide

    return draw


def shares(random: np.random.Generator) -> tuple[Floats, Floats]:
    """Values between 0 and 1, most of them small, as regrets are."""
    values = random.beta(0.1, 1.9, (STREAMS, VALUES))
    return values, np.full_like(values, 0.05)


def spiteful(random: np.random.Generator) -> tuple[Floats, Floats]:
    """Each mean depends on what came before: high while the values so far look good."""
    values, means = np.zeros((2, STREAMS, VALUES))
    so_far = np.zeros(STREAMS)
    for at in range(VALUES):
        means[:, at] = np.where(so_far <= 0.02 * at, 0.05, 0.005)
        values[:, at] = random.random(STREAMS) < means[:, at]
        so_far += values[:, at]
    return values, means


KINDS: dict[str, Draws] = {
    "rare": flips(np.full(VALUES, 0.01)),
    "often": flips(np.full(VALUES, 0.4)),
    "rises": flips(np.linspace(0.0, 0.2, VALUES)),
    "falls": flips(np.linspace(0.2, 0.0, VALUES)),
    "jumps": flips(np.where(COUNTS < 1000, 0.0, 0.5)),
    "swings": flips(0.1 + 0.1 * np.sin(COUNTS / 100)),
    "shares": shares,
    "spiteful": spiteful,
}


def deviations(values: Floats) -> Floats:
    """As a tally sums them up, at all times."""
    before = np.cumsum(values, axis=1) - values
    guesses = before / np.maximum(1, COUNTS - 1)
    found: Floats = np.cumsum((values - guesses) ** 2, axis=1)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_so_far_is_within_the_limits_at_all_times(kind: str) -> None:
    values, means = KINDS[kind](np.random.default_rng(7))
    away = np.abs(np.cumsum(values - means, axis=1))
    wrong = away > radius(deviations(values), ERROR / 2)
    assert np.count_nonzero(wrong.any(axis=1)) <= ERROR * STREAMS
    # an interval that is right at each moment is wrong at some moment: these streams can tell
    ordinary = 1.96 * np.sqrt(deviations(values)) + 1e-9
    assert np.count_nonzero((away > ordinary)[:, 100:].any(axis=1)) > 4 * ERROR * STREAMS


def test_the_limits_are_close_enough_to_be_of_use() -> None:
    clean, few, many = Tally(300), Tally(1000, 10.0, 9.9), Tally(100_000, 1000.0, 990.0)
    assert clean.interval(0.00625).high < 0.021
    assert few.interval(0.025).high < 0.025
    assert many.interval(0.025).high < 0.0114
    assert many.interval(0.025).low > 0.0086


def test_a_tally_counts_as_the_vectors_do() -> None:
    values = np.random.default_rng(3).random((1, VALUES))
    tally = Tally()
    for value in values[0]:
        tally.add(float(value))
    assert tally.deviation == pytest.approx(deviations(values)[0, -1])
    assert tally.mean == pytest.approx(values.mean())
    low, high = tally.interval(ERROR)[1:]
    width = float(radius(tally.deviation, ERROR)) / VALUES
    assert (low, high) == pytest.approx((tally.mean - width, tally.mean + width))


def test_nothing_is_known_before_the_first_value() -> None:
    assert Tally().interval(ERROR) == (0.0, 0.0, 1.0)
    one = Tally()
    one.add(1.0)
    assert one.interval(ERROR) == (1.0, 0.0, 1.0)
