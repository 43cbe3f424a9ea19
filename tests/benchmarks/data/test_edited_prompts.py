"""Prompts cut from real text, and prompts that share part of their tokens."""

from itertools import pairwise

import pytest

from benchmarks.data.edited_prompts import SCATTERED, Texts, TextsError, follower
from kvshare_store.lookup.align import align
from kvshare_store.nodes.edits import as_tokens
from tests.benchmarks.made_prompts import NEW, numbers


def test_texts_are_never_given_twice() -> None:
    texts = Texts([[1, 2, 3], [4], [5, 6]])
    assert texts.take(2) == [1, 2]
    assert texts.take(3) == [3, 4, 5]
    with pytest.raises(TextsError, match="too few"):
        texts.take(2)


@pytest.mark.parametrize("places", [1, SCATTERED])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("length", [256, 1000, 8160])
def test_a_follower_has_the_share_it_is_asked_for(length: int, share: float, places: int) -> None:
    base = list(range(length))
    made = follower(base, share, places, Texts(numbers()))
    kept = [token for token in made if token < NEW]
    assert len(made) == length
    assert len(kept) == length - round((1 - share) * length)
    assert kept == sorted(set(kept)), "kept text is in its old order"
    edges = sum(a >= NEW > b for a, b in pairwise(made))
    assert edges == places
    assert made[-1] < NEW, "the end is kept text"
    moved = [at for at, token in enumerate(made) if token < NEW and token != at]
    assert len(moved) > length // 10, "something has to be rotated"


def test_nothing_in_common_is_nothing_in_common() -> None:
    assert min(follower(list(range(50)), 0.0, 1, Texts(numbers()))) >= NEW


def test_alignment_finds_what_a_follower_kept() -> None:
    base = list(range(1000))
    made = follower(base, 0.9, SCATTERED, Texts(numbers()))
    found = align(as_tokens(made), as_tokens(base))
    assert sum(match.length for match in found) == 900
