"""Five streams of requests, each with the earlier prompt that it is an edit of. They differ in how
much an answer depends on what was edited."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data import datasets
from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.data.chat_prompts import Chat, sampled
from benchmarks.quality.probe_prompts import NAMES, Filler, probes
from benchmarks.quality.rag import excerpt, question_about
from examples.prompts.histories import Message, turns

Tokens = tuple[int, ...]


class Asked(NamedTuple):
    """A request, and what was sent before it."""

    request: Tokens
    donor: Tokens


class Source(NamedTuple):
    """What streams are made of."""

    data: Path
    chat: Chat
    tokenizer: Any
    """That of `chat`, as transformers has it."""


# --- templates, in which something stands before the text that they share -------------------------

_DIALOGUE = 150, 300
"""Characters of a dialogue: with two examples a prompt stays below 500 tokens."""
_SUMMARIZE = (
    "Ticket {number} of {name}, day {day} of the month.\n\nSummarize conversations in one short "
    "sentence. Name who does what.\n\n{examples}Conversation:\n{dialogue}\nSummary:"
)


def summaries(source: Source, n: int, seed: int) -> list[Asked]:
    """Dialogues in a template with two examples, behind a line that nothing depends on."""
    fitting = [
        row for row in datasets.samsum(source.data)
        if _DIALOGUE[0] <= len(row.dialogue) <= _DIALOGUE[1]
    ]  # fmt: skip
    rows = _drawn(fitting, n + 3, seed)
    shown, rows = rows[:2], rows[2:]
    examples = "".join(f"Conversation:\n{x.dialogue}\nSummary: {x.summary}\n\n" for x in shown)
    draw = random.Random(seed)
    asked = [
        _SUMMARIZE.format(
            number=draw.randint(1000, 9999), name=draw.choice(NAMES), day=draw.randint(1, 31),
            examples=examples, dialogue=row.dialogue,
        )
        for row in rows
    ]  # fmt: skip
    return _in_turn(source.chat, asked)


_SENTENCE = 60, 260
"""Characters of a sentence."""
_GUIDE = (
    "German: {}\n\nThe style guide of the agency. Write plain English that a reader of a newspaper "
    "would expect. Keep names of people, places and companies as they are. Write numbers below ten "
    "as words, all others in digits, and put a comma between thousands. Give dates with the day "
    "first, then the month as a word, then the year. Keep quotation marks where the sentence has "
    "them. Do not explain anything, do not add anything, and leave nothing out. Where a German "
    "word has no English one, describe it in a few words. Titles of books and films are kept, and "
    "translated in brackets behind them. Abbreviations are written out when they first occur. "
    "Sums of money keep their currency.\n\nTranslate the German sentence at the top into English "
    "by this guide. Write only the translation."
)


def translations(source: Source, n: int, seed: int) -> list[Asked]:
    """Sentences before a style guide: what is asked for stands in the edit, the guide behind it."""
    fitting = [
        row for row in datasets.wmt19(source.data, "de-en")
        if _SENTENCE[0] <= len(row.source) <= _SENTENCE[1]
    ]  # fmt: skip
    rows = _drawn(fitting, n + 1, seed)
    return _in_turn(source.chat, [_GUIDE.format(row.source) for row in rows])


def _drawn(rows: Sequence[Any], n: int, seed: int) -> list[Any]:
    """`n` rows, of which a smaller draw is the beginning."""
    return sampled(rows, len(rows), seed)[:n]


def _in_turn(chat: Chat, texts: list[str]) -> list[Asked]:
    """Each text as an edit of the one before it."""
    prompts = [chat.prompt(text) for text in texts]
    return [Asked(request, donor) for donor, request in pairwise(prompts)]


# --- conversations, passages, facts ---------------------------------------------------------------

_SYSTEM, _SAID = 600, 120
"""Characters that are kept of a system prompt, and of what is said."""
_TURNS = 3
"""Turns of a conversation, behind its first one."""
_STEP_S = 37


def dated(source: Source, n: int, seed: int) -> list[Asked]:
    """Turns of conversations whose system prompt has the time in it. Each is an edit of the turn
    before it, at another time."""
    recorded = list(conversations(source.data))
    random.Random(seed).shuffle(recorded)
    found: list[Asked] = []
    for messages in recorded:
        history = turns([_cut(message) for message in messages])[: _TURNS + 1]
        prompts = [
            tuple(as_tokens(_at(turn, (len(found) + at) * _STEP_S), source.tokenizer))
            for at, turn in enumerate(history)
        ]
        found += [Asked(request, donor) for donor, request in pairwise(prompts)]
    return found[:n]


def _cut(message: Message) -> Message:
    most = _SYSTEM if message["role"] == "system" else _SAID
    return {**message, "content": message["content"][:most]}


def _at(messages: list[Message], second: int) -> list[Message]:
    now = f"{9 + second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    system = messages[0]["content"].replace("15:00:00", now)
    return [{**messages[0], "content": system}, *messages[1:]]


_PASSAGES = 2


def passages(source: Source, n: int, seed: int) -> list[Asked]:
    """A question about three passages, which stood in another order under another question."""
    some = _drawn(datasets.musique(source.data), n + 1, seed)
    asked = []
    for one, other in pairwise(some):
        first, *rest = [excerpt(text, one.question) for text in one.passages[:_PASSAGES]]
        before, after = [*rest, first], [first, *rest]
        asked.append(
            Asked(
                source.chat.prompt(question_about(after, one.question)),
                source.chat.prompt(question_about(before, other.question)),
            )
        )
    return asked


_PROBES = 12
"""For each changed fact."""


def facts(source: Source, n: int, seed: int) -> list[Asked]:
    """Edit probes: one fact changed, and the answer is that fact or what unedited text says by
    pointing to it."""
    texts = datasets.minilongbench(source.data, "multi_news")
    filler = Filler(source.chat, [text.text for text in texts])
    made = probes(source.chat, filler, -(-n // _PROBES), seed)
    return [Asked(probe.request, probe.donor) for probe in made[:n]]


STREAMS: dict[str, Callable[[Source, int, int], list[Asked]]] = {
    "summaries": summaries,
    "translations": translations,
    "dated conversations": dated,
    "passages in another order": passages,
    "changed facts": facts,
}
"""Each makes some requests with a seed."""
