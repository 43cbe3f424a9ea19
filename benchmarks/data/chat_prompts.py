"""Chat prompts with reference answers, and near-duplicates of them that serve as donors."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.data import datasets


class Item(NamedTuple):
    """A text and its reference answers, written by people."""

    text: str
    references: tuple[str, ...]


class Task(NamedTuple):
    """Items with one instruction; the text replaces `{}` in it."""

    name: str
    instruction: str
    items: tuple[Item, ...]

    def ask(self, text: str) -> str:
        """The user's message."""
        return self.instruction.format(text)


TRANSLATE = (
    "Translate the following {language} sentence into English. Write only the translation.\n\n"
    "{language}: {{}}\n\nEnglish translation:"
)
SUMMARIZE = (
    "Summarize the following conversation in one or two short sentences. Name who does what.\n\n"
    "{}\n\nSummary:"
)


def translation(folder: Path, pair: str, n: int, seed: int) -> Task:
    """`n` sentences of newstest2019 into English."""
    language = {"de-en": "German", "zh-en": "Chinese"}[pair]
    rows = sampled(datasets.wmt19(folder, pair), n, seed)
    items = tuple(Item(row.source, (row.reference,)) for row in rows)
    return Task(f"WMT19 {pair}", TRANSLATE.format(language=language), items)


def summaries(folder: Path, n: int, seed: int) -> Task:
    """`n` dialogues of SAMSum."""
    rows = sampled(datasets.samsum(folder), n, seed)
    return Task("SAMSum", SUMMARIZE, tuple(Item(row.dialogue, (row.summary,)) for row in rows))


def sampled(rows: Sequence[Any], n: int, seed: int) -> list[Any]:
    """`n` rows drawn without replacement (all, if there are fewer)."""
    return random.Random(seed).sample(list(rows), min(n, len(rows)))


# --- near-duplicates: what somebody sent who used nearly the same text -----------------------


class Edit(NamedTuple):
    """A small change: `apply(text, other)` returns the donor's text."""

    name: str
    apply: Callable[[str, str], str]


def with_word_changed(text: str, other: str) -> str:
    """Replace the middle word of the text with the middle word of another text."""
    start, stop = _middle(text)
    first, last = _middle(other)
    return text[:start] + other[first:last] + text[stop:]


def with_number_changed(text: str, other: str) -> str:
    """Add one to every digit; without digits, insert a number after the middle word."""
    if re.search(r"[0-9]", text):
        return re.sub(r"[0-9]", lambda digit: str((int(digit[0]) + 1) % 10), text)
    _, stop = _middle(text)
    return f"{text[:stop]} (17){text[stop:]}"


def with_name_added(text: str, other: str) -> str:
    """Insert a name in brackets after the middle word."""
    _, stop = _middle(text)
    return f"{text[:stop]} (Maria Keller){text[stop:]}"


def with_sentence_added(text: str, other: str) -> str:
    """Put the first line of another text in front, so that all positions move."""
    mark = "\n" if "\n" in text else " "
    return other.split("\n")[0] + mark + text


EDITS = (
    Edit("word", with_word_changed),
    Edit("number", with_number_changed),
    Edit("name", with_name_added),
    Edit("sentence", with_sentence_added),
)


def near_duplicate(texts: Sequence[str], index: int) -> str:
    """The donor of text `index`: edits take turns, and use words of the next text."""
    edit = EDITS[index % len(EDITS)]
    return edit.apply(texts[index], texts[(index + 1) % len(texts)])


def _middle(text: str) -> tuple[int, int]:
    """Start and stop of the word nearest to the middle; in Chinese, of two characters."""
    words = [match.span() for match in re.finditer(r"\w+", text)]
    if not words:
        return len(text), len(text)
    start, stop = min(words, key=lambda span: abs(sum(span) - len(text)))
    if re.search(r"[\u4e00-\u9fff]", text[start:stop]):  # Chinese writes no blanks between words
        start = max(start, min((start + stop) // 2, stop - 2))
        stop = min(start + 2, stop)
    return start, stop


# --- as tokens -------------------------------------------------------------------------------


class Chat:
    """A chat model's tokenizer, with its template."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.stop: tuple[int, ...] = (self._tokenizer.eos_token_id,)

    def prompt(self, user: str, answer: str = "") -> tuple[int, ...]:
        """The tokens of a chat with one user turn, up to and with the beginning of an `answer`."""
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        return self.tokens(text + answer)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without a template."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of the tokens; control tokens are left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
