"""Table 1: the prompts, their donors, and the answers of every method."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.chat_prompts import Chat, Task, near_duplicate
from benchmarks.methods.base import Donor, Method, Prefilled, full_compute, generate, in_two_chunks
from benchmarks.methods.compared import BF16, FULL, NOISE, Arm
from benchmarks.peers.gptcache import GptCacheBaseline
from benchmarks.quality.answer_metrics import Metric
from benchmarks.quality.drafted_answers import drafted

NEW = 64
"""Tokens of an answer at most."""
BLOCK = 4
"""Prompts of like length whose caches are in memory together."""
GPTCACHE = "gptcache"
ANOTHER, NEAR = "another text", "near-duplicate"


@dataclass
class Asked:
    """One task, its prompts, and what every arm answered, in the order of the items."""

    task: Task
    metric: Metric
    prompts: list[tuple[int, ...]]
    near: list[str]
    """What the near-duplicate donors ask."""
    arms: dict[tuple[str, str], Arm] = field(default_factory=dict)
    """By method and donors."""

    def arm(self, method: str, donors: str) -> Arm:
        """The arm of that name; a new one has no answers yet."""
        return self.arms.setdefault((method, donors), Arm(method, donors, len(self.prompts)))


def asked_of(task: Task, metric: Metric, chat: Chat) -> Asked:
    """The prompts of a task, and those of their near-duplicates."""
    texts = [item.text for item in task.items]
    prompts = [chat.prompt(task.ask(text)) for text in texts]
    near = [task.ask(near_duplicate(texts, index)) for index in range(len(texts))]
    return Asked(task, metric, prompts, near)


def blocks(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of like length, `BLOCK` at a time and never one alone if there are two."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    starts = list(range(0, max(len(order) - 1, 1), BLOCK))
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        yield order[start:stop]


def answer_block(
    engine: RowEngine, chat: Chat, methods: list[Method], asked: Asked, block: list[int]
) -> None:
    """Full compute's answers to the prompts of a block, then every method's with both donors."""
    prompts = [asked.prompts[index] for index in block]
    full = [full_compute(engine, prompt) for prompt in prompts]
    drafts = generate(engine, full, NEW, chat.stop)
    for index, ready, draft in zip(block, full, drafts, strict=True):
        asked.arm(FULL, "").take(index, ready, chat.text(draft))
    whole = [
        Donor(prompt, ready.cache.rows[:, :, 0])
        for prompt, ready in zip(prompts, full, strict=True)
    ]
    waiting: list[tuple[Arm, int, Prefilled, list[int]]] = []
    for at, index in enumerate(block):
        edited = chat.prompt(asked.near[index])
        edited_full = full_compute(engine, edited)
        donors = {
            ANOTHER: whole[(at + 1) % len(whole)],
            NEAR: Donor(edited, edited_full.cache.rows[:, :, 0]),
        }
        # what GPTCache has stored is the answer to the donor
        waiting.append((asked.arm(FULL, "to the donor"), index, edited_full, drafts[at]))
        again = in_two_chunks(engine, prompts[at])
        waiting.append((asked.arm(NOISE, ""), index, again, drafts[at]))
        for kind, donor in donors.items():
            for method in methods:
                ready = method.prefill(engine, prompts[at], [donor])
                waiting.append((asked.arm(method.name, kind), index, ready, drafts[at]))
    _finish(engine, chat, waiting)


def answer_in_bf16(engine: RowEngine, chat: Chat, asked: Asked, block: list[int]) -> None:
    """Full compute's answers in bf16: `engine` is the model in bf16."""
    fp32 = asked.arm(FULL, "")
    waiting = [
        (
            asked.arm(BF16, ""),
            index,
            full_compute(engine, asked.prompts[index]),
            list(chat.tokens(fp32.answers[index])),
        )
        for index in block
    ]
    _finish(engine, chat, waiting)


def _finish(
    engine: RowEngine, chat: Chat, waiting: list[tuple[Arm, int, Prefilled, list[int]]]
) -> None:
    """Decode every prefilled prompt and keep the answers."""
    ready = [prefilled for _, _, prefilled, _ in waiting]
    answers = drafted(engine, ready, [draft for *_, draft in waiting], NEW, chat.stop)
    for (arm, index, prefilled, _), answer in zip(waiting, answers, strict=True):
        arm.take(index, prefilled, chat.text(answer))


def answer_from_gptcache(asked: Asked) -> None:
    """What GPTCache returns; on a miss the model is asked, and answers as full compute does."""
    users = [asked.task.ask(item.text) for item in asked.task.items]
    full = asked.arm(FULL, "").answers
    indices = range(len(users))
    # half of the texts ask a store that holds the other half
    for parity in (0, 1):
        stored = [(users[i], full[i]) for i in indices if i % 2 != parity]
        asking = [i for i in indices if i % 2 == parity]
        _ask_gptcache(asked, ANOTHER, stored, asking, users)
    donors = asked.arms.pop((FULL, "to the donor")).answers
    stored = list(zip(asked.near, donors, strict=True))
    _ask_gptcache(asked, NEAR, stored, list(indices), users)


def _ask_gptcache(
    asked: Asked, donors: str, stored: list[tuple[str, str]], asking: list[int], users: list[str]
) -> None:
    full = asked.arm(FULL, "").answers
    with tempfile.TemporaryDirectory() as folder, GptCacheBaseline(Path(folder)) as cache:
        arm = asked.arm(GPTCACHE, donors)  # none where the package is missing
        cache.put_all(stored)
        for index in asking:
            found = cache.ask(users[index])
            arm.answers[index] = full[index] if found is None else found
            arm.reused[index] = 0 if found is None else len(asked.prompts[index])
