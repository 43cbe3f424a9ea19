"""Long prompts of real text that share a known part of their tokens with an earlier prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data.datasets import minilongbench
from benchmarks.harness.models import tokenizer_of
from benchmarks.harness.result import Options

_TASKS = (
    "gov_report", "narrativeqa", "qmsum", "multi_news", "hotpotqa", "2wikimqa", "musique",
    "triviaqa", "passage_retrieval_en",
)  # fmt: skip
SCATTERED = 4
"""Places at which a scattered edit changes the text."""


class TextsError(RuntimeError):
    """The data set is too short for what is asked."""


class Texts:
    """Real text as one stream of tokens; no token is handed out twice."""

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        self._documents = iter(documents)
        self._ready: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next `count` tokens; `TextsError` when the stream has ended."""
        while len(self._ready) < count:
            document = next(self._documents, None)
            if document is None:
                raise TextsError("the texts have too few tokens for so many prompts")
            self._ready += document
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken


def long_texts(options: Options) -> Texts:
    """The prompts of MiniLongBench, one after the other, as tokens of the model."""
    return Texts(_documents(options.data, tokenizer_of(options)))


def _documents(data: Path, tokenizer: Any) -> Iterator[list[int]]:
    for task in _TASKS:
        for prompt in minilongbench(data, task):
            yield tokenizer(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]


def follower(base: Sequence[int], share: float, places: int, texts: Texts) -> list[int]:
    """A prompt as long as `base` that has `share` of its tokens in common with it.

    The rest is new text, inserted in equal parts at `places` places that part the kept text evenly:
    a quarter into it if there is one, 1/8, 3/8, 5/8 and 7/8 into it if there are four. Half as much
    of `base` is removed at each place, so everything after the first one has moved, and what does
    not fit is cut at the end.
    """
    length = len(base)
    changed = round((1 - share) * length)
    kept = length - changed
    if not kept:
        return texts.take(length)
    parts = [changed * (i + 1) // places - changed * i // places for i in range(places)]
    ends = [kept * (2 * i + 1) // (2 * places) if places > 1 else kept // 4 for i in range(places)]
    made: list[int] = []
    source = taken = 0
    for part, end in zip(parts, ends, strict=True):
        made += base[source : source + end - taken]
        source += end - taken + part // 2
        taken = end
        made += texts.take(part)
    made += base[source : source + kept - taken]
    return made
