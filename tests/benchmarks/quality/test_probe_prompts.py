"""Probes: one fact differs, in the place and to the extent that they claim."""

from __future__ import annotations

import re
from itertools import product

import pytest

from benchmarks.quality.probe_prompts import (
    FAR_GAP,
    MAX_SPAN,
    QUESTIONS,
    RECORDS,
    VALUES,
    Filler,
    Probe,
    probes,
)
from kvshare_store.lookup.align import align
from kvshare_store.nodes.edits import as_tokens

PAIRS = 2 * len(RECORDS)


class Words:
    """A tokenizer of words with leading blanks, and a template of one word on each side."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def tokens(self, text: str) -> tuple[int, ...]:
        pieces = re.findall(r"\s?\w+|\s?[^\w\s]|\s", text)
        return tuple(self.ids.setdefault(piece, len(self.ids)) for piece in pieces)

    def prompt(self, user: str, answer: str = "") -> tuple[int, ...]:
        return self.tokens(f"<user>{user}<assistant>{answer}")


@pytest.fixture(scope="module")
def made() -> list[Probe]:
    """Probes with two changed facts of each kind."""
    chat = Words()
    text = " ".join(f"filler{i}" for i in range(5000))
    return probes(chat, Filler(chat, [text]), PAIRS, seed=1)


def test_every_combination_is_there_once_for_each_fact(made):
    combinations = {(p.question, p.distance, p.same_length) for p in made}
    assert combinations == set(product(QUESTIONS, ["near", "far"], [True, False]))
    assert len(made) == 12 * PAIRS


def test_request_and_donor_differ_in_one_short_span(made):
    for probe in made:
        request, donor = as_tokens(probe.request), as_tokens(probe.donor)
        matches = align(request, donor)
        assert len(request) - sum(m.length for m in matches) <= MAX_SPAN
        assert len(donor) - sum(m.length for m in matches) <= MAX_SPAN
        assert (len(request) == len(donor)) == probe.same_length


def test_the_answers_begin_differently_and_each_is_in_its_own_prompt(made):
    for probe in made:
        assert probe.new != probe.old
        assert probe.new in probe.request
        assert probe.old in probe.donor
        # a rival keeps the old value in the request, about another subject
        assert (probe.old in probe.request) == (probe.question == "rival")


def test_a_far_record_is_at_least_250_tokens_from_what_depends_on_it(made):
    near = [p for p in made if p.distance == "near"]
    far = [p for p in made if p.distance == "far"]
    for a, b in zip(near, far, strict=True):
        assert len(b.request) - len(a.request) >= FAR_GAP - 10 >= 250


def test_the_unedited_sentence_does_not_name_the_value():
    for record in RECORDS:
        assert "{}" in record.fact
        assert "{}" not in record.derived + record.direct_question + record.derived_question
        assert len(set(VALUES[record.kind])) == len(VALUES[record.kind])


def test_the_same_seed_gives_the_same_probes(made):
    chat = Words()
    text = " ".join(f"filler{i}" for i in range(5000))
    again = probes(chat, Filler(chat, [text]), PAIRS, seed=1)
    assert [p[:4] for p in again] == [p[:4] for p in made]
    other = probes(chat, Filler(chat, [text]), PAIRS, seed=2)
    assert [p.request for p in other] != [p.request for p in again]


def test_filler_is_not_given_twice():
    chat = Words()
    filler = Filler(chat, ["a b c d", "e f g h"])
    assert filler.take(0) == ""
    assert [filler.take(3), filler.take(3)] == ["a b c", "d e f"]
