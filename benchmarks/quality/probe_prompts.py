"""Edit probes: prompts in which one fact changed, and questions that show which one is used.

After arXiv 2609.17983. A record names a value once, in the sentence that is edited. *Direct*
questions ask for that value. *Derived* ones ask for what an unedited sentence says by pointing back
to it ("... in that same city"), whose rows, computed beside the old value, may still hold it. That
sentence follows at once (near) or after at least 250 tokens (far). *Rival* questions are derived
ones, and the old value stays in the prompt, said of somebody else just before: looking for the only
city in the text is then no way to the answer. Filler before, between and after is real text on
something else, so that nothing is within the tail of the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.data.chat_prompts import Chat

BEFORE, NEAR_GAP, FAR_GAP, AFTER = 30, 0, 260, 90
"""Tokens of filler before the record, between its two sentences, and after it."""
QUESTIONS = ("direct", "derived", "rival")
MAX_SPAN = 6
"""Tokens of an edited value at most."""


class Record(NamedTuple):
    """A kind of record. `{}` is the value, `{name}` and `{other}` are people."""

    kind: str
    fact: str
    derived: str
    direct_question: str
    direct_answer: str
    derived_question: str
    derived_answer: str


RECORDS = (
    Record(
        "city",
        "{name} works at the office in {}.",
        "{other} works in that same city, at the same office as {name}.",
        "In which city does {name} work?",
        "{name} works in",
        "In which city does {other} work?",
        "{other} works in",
    ),
    Record(
        "day",
        "The meeting with {name} is on {}.",
        "{other} flies home on the same day, right after that meeting.",
        "On which day is the meeting with {name}?",
        "The meeting with {name} is on",
        "On which day does {other} fly home?",
        "{other} flies home on",
    ),
    Record(
        "colour",
        "The car of {name} is painted {}.",
        "{other} has a bicycle of exactly the same colour as that car.",
        "What colour is the car of {name}?",
        "The car of {name} is",
        "What colour is the bicycle of {other}?",
        "The bicycle of {other} is",
    ),
    Record(
        "fruit",
        "The only fruit that {name} buys is the {}.",
        "{other} eats nothing but that same fruit.",
        "Which fruit does {name} buy?",
        "{name} buys the",
        "Which fruit does {other} eat?",
        "{other} eats the",
    ),
    Record(
        "country",
        "{name} was born in {}.",
        "{other} was born in the very same country as {name}.",
        "In which country was {name} born?",
        "{name} was born in",
        "In which country was {other} born?",
        "{other} was born in",
    ),
)
VALUES = {
    "city": (
        "Oslo", "Berlin", "Lima", "Madrid", "Dublin", "Vienna", "Toronto", "Chicago", "Boston",
        "Tokyo", "New York", "San Francisco", "Buenos Aires", "Los Angeles", "Mexico City",
        "Hong Kong", "Cape Town",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
            "New Year's Day", "Good Friday", "Christmas Eve"),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "orange", "purple",
               "dark grey", "light brown", "bright pink"),
    "fruit": ("apple", "banana", "orange", "lemon", "peach", "cherry", "water melon",
              "passion fruit", "star fruit", "dragon fruit"),
    "country": ("Spain", "Norway", "Brazil", "Japan", "Kenya", "France", "Canada", "Egypt",
                "New Zealand", "South Africa", "Sri Lanka", "Costa Rica"),
}  # fmt: skip
NAMES = (
    "Anna", "Peter", "Maria", "Thomas", "Laura", "David", "Sarah", "Michael", "Julia", "Daniel",
    "Emma", "Robert", "Alice", "George", "Helen", "Frank",
)  # fmt: skip


class Probe(NamedTuple):
    """One changed fact and one question."""

    kind: str
    question: str
    """`direct`, `derived` or `rival`."""
    distance: str
    """`near` or `far`."""
    same_length: bool
    """Whether old and new value have as many tokens."""
    request: tuple[int, ...]
    donor: tuple[int, ...]
    new: int
    """First token of the new value, as the answer would continue with it."""
    old: int


def probes(chat: Chat, filler: Filler, pairs: int, seed: int) -> list[Probe]:
    """Twelve probes for each of `pairs` changed facts: question, distance, length of the value."""
    draw = random.Random(seed)
    made = []
    for index in range(pairs):
        record = RECORDS[index % len(RECORDS)]
        people = draw.sample(NAMES, 3)
        for same_length in (True, False):
            old, new = _values(chat, record.kind, same_length, draw)
            for distance, gap in (("near", NEAR_GAP), ("far", FAR_GAP)):
                around = filler.take(BEFORE), filler.take(gap), filler.take(AFTER)
                for question in QUESTIONS:
                    texts = [
                        _prompt(chat, record, value, old, people, around, question)
                        for value in (new, old)
                    ]
                    first_new, first_old = (chat.tokens(" " + value)[0] for value in (new, old))
                    made.append(
                        Probe(
                            record.kind, question, distance, same_length, *texts,
                            first_new, first_old,
                        )
                    )  # fmt: skip
    return made


def _prompt(
    chat: Chat,
    record: Record,
    value: str,
    old: str,
    people: Sequence[str],
    around: tuple[str, str, str],
    question: str,
) -> tuple[int, ...]:
    before, between, after = around
    name, other, third = people
    fact = record.fact.format(value, name=name)
    if question == "rival":
        fact = f"{record.fact.format(old, name=third)} {fact}"
    derived = record.derived.format(name=name, other=other)
    asked = record.direct_question if question == "direct" else record.derived_question
    begun = record.direct_answer if question == "direct" else record.derived_answer
    parts = [before, f"{fact} {between}".strip(), f"{derived} {after}"]
    if not between:
        parts = [before, f"{fact} {derived} {after}"]
    text = "\n".join(["Read these notes.", "", *parts, "", asked.format(name=name, other=other)])
    return chat.prompt(text, begun.format(name=name, other=other))


def _values(chat: Chat, kind: str, same_length: bool, draw: random.Random) -> tuple[str, str]:
    """Two values of a kind that begin with different tokens, as long as each other or not."""
    tokens = {value: chat.tokens(" " + value) for value in VALUES[kind]}
    pairs = [
        (old, new)
        for old in tokens
        for new in tokens
        if tokens[old][0] != tokens[new][0]
        and (len(tokens[old]) == len(tokens[new])) == same_length
        and max(len(tokens[old]), len(tokens[new])) <= MAX_SPAN
    ]
    return draw.choice(pairs)


class Filler:
    """Real text in pieces of a given length; none is given twice before all were."""

    def __init__(self, chat: Chat, texts: Sequence[str]) -> None:
        self._chat = chat
        self._words = self._stream(texts)

    def take(self, tokens: int) -> str:
        """Whole words that are at least `tokens` tokens, and none for 0."""
        words: list[str] = []
        count = 0
        while count < tokens:
            words.append(next(self._words))
            count += len(self._chat.tokens(" " + words[-1]))
        return " ".join(words)

    @staticmethod
    def _stream(texts: Sequence[str]) -> Iterator[str]:
        while True:
            for text in texts:
                yield from text.split()
