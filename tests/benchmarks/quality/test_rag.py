"""Retrieval prompts: what a donor shares with its request."""

from __future__ import annotations

import pytest

from benchmarks.data.datasets import Question
from benchmarks.quality.rag import REPLACED, WORDS, excerpt, requests


class Letters:
    """Stands in for the tokenizer: the prompt is its own text."""

    def prompt(self, user: str) -> str:
        return user


def passage(question: int, number: int) -> str:
    return f"passage{question}x{number} says something"


@pytest.fixture
def questions() -> list[Question]:
    """Questions with ten passages each."""
    return [
        Question(f"What about {q}?", tuple(passage(q, p) for p in range(10)), (f"answer {q}",))
        for q in range(6)
    ]


def test_an_excerpt_holds_the_place_that_the_question_is_about():
    text = " ".join(["filler"] * 300 + ["the", "Hannibal", "play"] + ["filler"] * 300)
    cut = excerpt(text, "Who wrote the play Hannibal?")
    assert "Hannibal play" in cut
    assert len(cut.split()) == WORDS


def test_a_short_passage_is_kept_whole_and_an_unrelated_one_from_its_start():
    assert excerpt("only three words", "Who?") == "only three words"
    text = " ".join(str(i) for i in range(WORDS + 50))
    assert excerpt(text, "Who?").split()[0] == "0"


def test_donors_share_the_passages_and_not_the_question(questions):
    asked = requests(Letters(), questions, n=4, seed=1)
    assert len(asked) == 4
    for one in asked:
        number = one.answers[0].split()[1]
        own = [passage(int(number), p) for p in range(10)]
        assert f"What about {number}?" in one.request
        assert all(text in one.request for text in own)
        shuffled, replaced = one.donors["shuffled"], one.donors["replaced"]
        assert f"What about {number}?" not in shuffled + replaced
        assert all(text in shuffled for text in own)
        places = [shuffled.index(text) for text in own]
        assert places != sorted(places)
        kept = [text for text in own if text in replaced]
        assert len(kept) == 10 - REPLACED
        places = [replaced.index(text) for text in kept]
        assert places == sorted(places)
