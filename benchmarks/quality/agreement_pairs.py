"""Pairs of similar ShareGPT prompts: one that is asked, and an earlier one that is its donor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import blake3
import numpy as np

from benchmarks.data import datasets
from benchmarks.data.chat_prompts import Chat
from kvshare_store.cli.progress import track
from kvshare_store.lookup.align import align
from kvshare_store.nodes.edits import as_tokens
from kvshare_store.nodes.vectors import lexical_vector

Split = Literal["tune", "report"]

_CHARACTERS = 100, 6000
TOKENS = 64, 1024
SHARE = 0.8
"""Least share of the prompt that aligns with the donor in runs of at least `_RUN` tokens."""
_RUN = 8
_AFTER_EDIT = 16
"""Least number of such tokens after the first edit; below it, prefix caching is enough."""
_NOMINATED = 4
_PER_DONOR = 2
"""Most uses of one prompt as a donor, so that a popular template does not dominate the mean."""


class SimilarPair(NamedTuple):
    """A prompt and its donor, as tokens in the chat template."""

    id: str
    prompt: tuple[int, ...]
    donor: tuple[int, ...]
    alignable: float
    """Share of the prompt's tokens in aligned runs."""
    earlier: tuple[tuple[int, ...], ...] = ()
    """Other earlier prompts, most similar first, that cover as much of the prompt as a donor."""


def similar_pairs(folder: Path, chat: Chat, split: Split, n: int) -> list[SimilarPair]:
    """At most `n` pairs of one half of ShareGPT's similar prompts, see `halves`."""
    return halves(folder, chat)[split][:n]


def halves(folder: Path, chat: Chat) -> dict[Split, list[SimilarPair]]:
    """All pairs of ShareGPT's similar prompts by half, each in an order drawn by hash.

    Every human turn counts as a prompt of its own; its donor is the earlier prompt that covers
    most. Halves and order come from the prompt's id alone, so a prompt is never in both halves, and
    a smaller sample is the beginning of a larger one.
    """
    prompts = _distinct_prompts(folder, chat)
    pairs: list[SimilarPair] = []
    used: dict[int, int] = {}
    nominated = _nominated([tokens for _, tokens in prompts])
    for at, (name, tokens) in enumerate(track(prompts, "Aligning similar prompts")):
        shares = [(_alignable(tokens, prompts[donor][1]), donor) for donor in nominated[at]]
        similar = sorted((one for one in shares if one[0] >= SHARE), reverse=True)
        if not similar or used.get(similar[0][1], 0) >= _PER_DONOR:
            continue
        (share, donor), *others = similar
        used[donor] = used.get(donor, 0) + 1
        earlier = tuple(prompts[other][1] for _, other in others)
        pairs.append(SimilarPair(name, tokens, prompts[donor][1], share, earlier))
    drawn = sorted((_hash(pair.id), pair) for pair in pairs)
    found: dict[Split, list[SimilarPair]] = {"tune": [], "report": []}
    for digest, pair in drawn:
        found["report" if digest[-1] % 2 else "tune"].append(pair)
    return found


def _distinct_prompts(folder: Path, chat: Chat) -> list[tuple[str, tuple[int, ...]]]:
    first: dict[str, str] = {}
    for prompt in datasets.all_turns(datasets.sharegpt(folder)):
        if _CHARACTERS[0] <= len(prompt.text) <= _CHARACTERS[1]:
            first.setdefault(prompt.text, prompt.id)
    prompts = [
        (name, tuple(chat.prompt(text)))
        for text, name in track(first.items(), "Reading ShareGPT as tokens")
    ]
    return [(name, ids) for name, ids in prompts if TOKENS[0] <= len(ids) <= TOKENS[1]]


def _nominated(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """For each prompt the earlier ones with the most similar lexical vectors."""
    vectors = np.stack([lexical_vector(as_tokens(tokens)) for tokens in prompts])
    found: list[list[int]] = []
    for at, vector in enumerate(track(vectors, "Comparing prompts")):
        cosines = vectors[:at] @ vector
        best = np.argsort(-cosines)[:_NOMINATED]
        found.append([int(donor) for donor in best if cosines[donor] > 0.3])
    return found


def _alignable(prompt: tuple[int, ...], donor: tuple[int, ...]) -> float:
    """Share of the prompt in long runs of the donor; 0 where there is no edit to speak of."""
    runs = [run for run in align(as_tokens(prompt), as_tokens(donor)) if run.length >= _RUN]
    after = sum(run.length for run in runs if run.start > 0 or run.source > 0)
    if after < _AFTER_EDIT or prompt == donor:
        return 0.0
    return sum(run.length for run in runs) / len(prompt)


def _hash(name: str) -> bytes:
    return blake3.blake3(name.encode()).digest(length=8)
