"""Other ways to count agreement: what each leaves out and how it weighs."""

import numpy as np
import pytest

from benchmarks.quality.agreement_pairs import SimilarPair
from benchmarks.quality.agreement_weights import Pairs, edits_per_100, heaviest, known, row, ways


def pair(name: str, prompt: tuple[int, ...], donor: tuple[int, ...] = (0,)) -> SimilarPair:
    return SimilarPair(name, prompt, donor, 0.9)


def test_a_pair_is_tied_by_its_texts_or_its_conversation_whatever_the_part() -> None:
    chosen_on = [pair("abc_0#1", (1, 2, 9), (1, 2, 8))]
    reported = [
        pair("abc_13#0", (1, 2, 3, 4)),  # another part of that conversation
        pair("other_0#0", (1, 2, 5), (1, 2, 8)),  # the same donor
        pair("third#0", (1, 2, 6), (1, 2, 9)),  # that prompt is its donor
        pair("abcd_0#1", (1, 2, 7)),
    ]
    found = known(reported, chosen_on)
    assert found.tied.tolist() == [True, True, True, False]
    assert found.template == 2
    assert found.tokens.tolist() == [4, 3, 3, 3]


def test_each_way_keeps_and_weighs_what_it_says() -> None:
    pairs = Pairs(np.array([100, 300]), 20, np.array([True, False]))
    values = np.array([[0.5, 2.0], [0.9, 6.0]])
    draws = np.random.default_rng(0)
    rows = {way.name: row("method", way, pairs, values, 2.0, draws) for way in ways(pairs)}
    counted = {name: (line[2], line[3], line[4]) for name, line in rows.items()}
    assert counted["as in agreement"] == pytest.approx((2, 320 / 400, 2.0))
    assert counted["both by prompts"] == pytest.approx((2, 0.7, 2.0))
    assert counted["both by tokens"] == pytest.approx((2, 320 / 400, 2.5))
    assert counted["without the template"] == pytest.approx((2, 280 / 360, 2.0))
    assert counted["without ties"] == pytest.approx((1, 0.9, 3.0))
    assert counted["256 tokens and more"] == pytest.approx((1, 0.9, 3.0))
    assert counted["the pairs of the floor"] == pytest.approx((1, 0.5, 1.0))
    assert rows["without ties"][5] == "3.0 to 3.0"


def test_a_way_that_keeps_no_pair_says_so() -> None:
    pairs = Pairs(np.array([100]), 20, np.array([True]))
    untied = next(way for way in ways(pairs) if way.name == "without ties")
    line = row("method", untied, pairs, np.array([[0.5, 2.0]]), 2.0, np.random.default_rng(0))
    assert line == ["method", "without ties", 0, None, None, None]


def test_edits_and_the_pairs_that_make_half_of_the_mean() -> None:
    assert edits_per_100([pair("a", tuple(range(100)), (*range(50), 999, *range(50, 99)))]) == 2
    assert "from 1 of 4 pairs" in heaviest("m", np.array([0.1, 0.1, 0.9, 0.1]), 0.1)
