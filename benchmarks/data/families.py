"""Families of prompts: one template whose slots are filled anew each time, made of real texts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data import datasets
from benchmarks.data.chat_prompts import Chat, sampled

EARLIER = 3
"""Prompts of a family that were computed in full before, beside the donor."""
ASKED = 2
"""Prompts of a family that methods are compared on."""
_MEMBERS = 1 + EARLIER + ASKED
_CLIENTS = (
    "Brightwater Press", "the city of Utrecht", "Halden Robotics", "the Nordic Film Archive",
    "Calloway & Sons", "the Museum of Glass", "Orchard Street Clinic", "Meridian Airlines",
    "Foxglove Books", "the Port Authority", "Tamsin Wheelworks", "Larkhill University",
)  # fmt: skip
_DAYS = ("3 May", "17 June", "28 August", "9 October", "12 December", "30 January")
_NAMES = (
    "Teresa", "Olaf", "Priya", "Marcus", "Yuki", "Ingrid", "Samuel", "Beatrix", "Dmitri", "Naomi",
    "Felix", "Amara",
)  # fmt: skip


class Family(NamedTuple):
    """Prompts of one template, as tokens in the chat template."""

    kind: str
    name: str
    """The kind and a number."""
    donor: tuple[int, ...]
    earlier: tuple[tuple[int, ...], ...]
    asked: tuple[tuple[int, ...], ...]


class Sources(NamedTuple):
    """The texts of one half, each handed out once."""

    sentences: Iterator[datasets.Pair]
    dialogues: Iterator[datasets.Dialogue]
    short: Iterator[datasets.Dialogue]
    questions: Iterator[datasets.Question]
    draw: random.Random


def families(folder: Path, chat: Chat, split: str, each: int, seed: int) -> list[Family]:
    """`each` families of every kind (`KINDS`) of the half `tune` or `report`. A smaller sample is
    the beginning of a larger one. `DataError` if the sets have too few texts for so many."""
    found = []
    for kind, make in KINDS.items():
        half = sources(folder, split, seed)
        for number in range(each):
            try:
                donor, *others = map(chat.prompt, make(half))
            except StopIteration:
                raise datasets.DataError(f"too few texts for {each} families of {kind}") from None
            earlier, asked = tuple(others[:EARLIER]), tuple(others[EARLIER:])
            found.append(Family(kind, f"{kind} {number}", donor, earlier, asked))
    return found


def sources(folder: Path, split: str, seed: int) -> Sources:
    """The texts of one half, in an order drawn by `seed`: no text is in both halves."""
    dialogues = datasets.samsum(folder)
    short = [row for row in dialogues if len(row.dialogue) < 400]
    long = [row for row in dialogues if 500 <= len(row.dialogue) < 1200 and _speaker(row.dialogue)]
    sentences = [row for row in datasets.wmt19(folder, "de-en") if 60 <= len(row.source) < 180]
    kept = (half(rows, split, seed) for rows in (sentences, long, short))
    questions = half(datasets.musique(folder), split, seed)
    return Sources(*map(iter, kept), iter(questions), random.Random(seed))


def half(rows: Sequence[Any], split: str, seed: int) -> list[Any]:
    """Every second of the rows in a drawn order."""
    drawn = sampled(rows, len(rows), seed)
    return drawn[::2] if split == "tune" else drawn[1::2]


# --- the kinds: each makes the user's messages of one family ---------------------------------


def header(texts: Sources) -> list[str]:
    """The head names a client and a day; rules and examples stay, each asks for a sentence."""
    shots = _examples(texts, 4)
    clients = texts.draw.sample(_CLIENTS, _MEMBERS)
    days = texts.draw.sample(_DAYS, _MEMBERS)
    return [
        f"You translate for {client}. Today is {day}. Translate from German into English. Keep"
        f" names and numbers as they are. Write only the translation.\n\n{shots}\n\n"
        f"German: {next(texts.sentences).source}\nEnglish:"
        for client, day in zip(clients, days, strict=True)
    ]


def renamed(texts: Sources) -> list[str]:
    """The same conversation, in which somebody has another name wherever it stands."""
    dialogue = next(texts.dialogues).dialogue
    name = _speaker(dialogue)
    spelled = re.compile(rf"\b{name}\b")
    others = texts.draw.sample([one for one in _NAMES if one not in dialogue], _MEMBERS - 1)
    return [
        "Summarize the following conversation in one or two short sentences. Name who does what."
        f"\n\n{spelled.sub(other, dialogue)}\n\nSummary:"
        for other in (name, *others)
    ]


def example(texts: Sources) -> list[str]:
    """Three examples, of which the first is another one each time; each asks for a summary."""
    fixed = "\n\n".join(_summary(next(texts.short)) for _ in range(2))
    return [
        "Summarize conversations as in these examples.\n\n"
        f"{_summary(next(texts.short))}\n\n{fixed}\n\n"
        f"Conversation:\n{next(texts.short).dialogue}\nSummary:"
        for _ in range(_MEMBERS)
    ]


def reordered(texts: Sources) -> list[str]:
    """Five examples in another order each time; each asks for a sentence."""
    shots = [_examples(texts, 1) for _ in range(5)]
    return [
        "Translate from German into English as in these examples.\n\n"
        + "\n\n".join(texts.draw.sample(shots, len(shots)))
        + f"\n\nGerman: {next(texts.sentences).source}\nEnglish:"
        for _ in range(_MEMBERS)
    ]


def passages(texts: Sources) -> list[str]:
    """Five passages in another order each time, and another question."""
    questions = [next(texts.questions) for _ in range(_MEMBERS)]
    found = [" ".join(text.split()[:70]) for text in questions[0].passages[:5]]
    return [
        "Answer the question from the passages. Answer within 5 words.\n\n"
        + "\n\n".join(texts.draw.sample(found, len(found)))
        + f"\n\nQuestion: {one.question}\nAnswer within 5 words."
        for one in questions
    ]


KINDS: dict[str, Callable[[Sources], list[str]]] = {
    "header": header,
    "renamed": renamed,
    "example": example,
    "reordered": reordered,
    "passages": passages,
}


def _examples(texts: Sources, count: int) -> str:
    rows = [next(texts.sentences) for _ in range(count)]
    return "\n\n".join(f"German: {row.source}\nEnglish: {row.reference}" for row in rows)


def _summary(row: datasets.Dialogue) -> str:
    return f"Conversation:\n{row.dialogue}\nSummary: {row.summary}"


def _speaker(dialogue: str) -> str:
    """The first speaker, if that is one capitalized word that occurs three times at least."""
    name = dialogue.partition(":")[0].strip()
    plain = re.fullmatch(r"[A-Z][a-z]{2,}", name)
    return name if plain and len(re.findall(rf"\b{name}\b", dialogue)) >= 3 else ""
