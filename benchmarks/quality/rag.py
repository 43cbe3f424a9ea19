"""Retrieval prompts: CacheBlend's MuSiQue sample. Is F1 kept when the passages were seen before?

Donors are an earlier request of somebody who asked something else: `shuffled` had the same passages
in another order, `replaced` had the same order, with some passages that the request does not have.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data import datasets
from benchmarks.data.chat_prompts import Chat, sampled
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.base import (
    Prefilled,
    donor_of,
    full_compute,
    generate,
    in_two_chunks,
    teacher_forced,
)
from benchmarks.methods.compared import BF16, FULL, NOISE, Arm, engine_for, lineup, steps
from benchmarks.quality.answer_metrics import Metric, paired_bootstrap, token_f1
from benchmarks.quality.drafted_answers import drafted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from benchmarks.methods.base import Method

NEW = 32
"""Tokens of an answer at most, as in CacheBlend's evaluation."""
WORDS = 80
"""Words kept of each passage: those around which the question's words are densest."""
REPLACED = 3
"""Passages of ten that a `replaced` donor does not share with the request."""
SHUFFLED, REPLACING = "shuffled", "replaced"
ASK = (
    "Answer the question from the passages. Answer within 5 words.\n\n{passages}\n\n"
    "Question: {question}\nAnswer within 5 words."
)


class Asked(NamedTuple):
    """A request and what was asked before it."""

    request: tuple[int, ...]
    donors: dict[str, tuple[int, ...]]
    answers: tuple[str, ...]


def measure(options: Options) -> Result:
    """Every method's answers, their F1 and their agreement with full compute."""
    engine, chat, model = engine_for(options)
    asked = requests(chat, datasets.musique(options.data), options.size(20, 1), options.seed)
    arms: dict[tuple[str, str], Arm] = {}
    divergence: dict[tuple[str, str], list[float]] = {}
    half, _, _ = engine_for(options, torch.bfloat16)
    methods = lineup(engine, short=options.short)
    with steps("Asking about passages", len(asked)) as step:
        for index, one in enumerate(asked):
            for key, (ready, answer, kl) in _answer(engine, half, chat, methods, one).items():
                arm = arms.setdefault(key, Arm(*key, len(asked)))
                arm.take(index, ready, answer)
                divergence.setdefault(key, []).append(kl)
            step(1)
    return _result(asked, arms, divergence, chat, options, model)


# --- prompts ---------------------------------------------------------------------------------


def requests(chat: Chat, questions: Sequence[datasets.Question], n: int, seed: int) -> list[Asked]:
    """`n` requests with their donors. Another question's passages replace; another one is asked."""
    draw = random.Random(seed)
    some = sampled(questions, n + 1, seed)
    asked = []
    for one, other in pairwise(some):
        passages = [excerpt(text, one.question) for text in one.passages]
        shuffled = draw.sample(passages, len(passages))
        replaced = list(passages)
        for at in draw.sample(range(len(passages)), REPLACED):
            replaced[at] = excerpt(other.passages[at], other.question)
        asked.append(
            Asked(
                chat.prompt(question_about(passages, one.question)),
                {
                    SHUFFLED: chat.prompt(question_about(shuffled, other.question)),
                    REPLACING: chat.prompt(question_about(replaced, other.question)),
                },
                one.answers,
            )
        )
    return asked


def question_about(passages: Sequence[str], question: str) -> str:
    """What the user writes."""
    return ASK.format(passages="\n\n".join(passages), question=question)


def excerpt(text: str, question: str) -> str:
    """The `WORDS` words in a row that hold most of the question's words; the first such place."""
    words = text.split()
    wanted = {word for word in re.findall(r"\w+", question.lower()) if len(word) > 3}
    hits = [bool(wanted & set(re.findall(r"\w+", word.lower()))) for word in words]
    starts = range(max(1, len(words) - WORDS + 1))
    best = max(starts, key=lambda start: (sum(hits[start : start + WORDS]), -start))
    return " ".join(words[best : best + WORDS])


# --- answers ---------------------------------------------------------------------------------


def _answer(
    engine: RowEngine, half: RowEngine, chat: Chat, methods: Sequence[Method], asked: Asked
) -> dict[tuple[str, str], tuple[Prefilled, str, float]]:
    """Every arm's prefill, answer, and mean KL over the tokens of full compute's answer."""
    full = full_compute(engine, asked.request)
    draft = generate(engine, [full], NEW, chat.stop)[0]
    forced = draft or [chat.stop[0]]
    truth = teacher_forced(engine, full, forced)
    ready = {(FULL, ""): full, (NOISE, ""): in_two_chunks(engine, asked.request)}
    for kind, tokens in asked.donors.items():
        donor = donor_of(engine, tokens)
        for method in methods:
            ready[method.name, kind] = method.prefill(engine, asked.request, [donor])
    answers = drafted(engine, list(ready.values()), [draft] * len(ready), NEW, chat.stop, batch=4)
    seen = {
        key: (one, chat.text(answer), _kl(truth, teacher_forced(engine, one, forced)))
        for (key, one), answer in zip(ready.items(), answers, strict=True)
    }
    again = full_compute(half, asked.request)
    answer = drafted(half, [again], [draft], NEW, chat.stop)[0]
    seen[BF16, ""] = again, chat.text(answer), _kl(truth, teacher_forced(half, again, forced))
    return seen


def _kl(truth: Tensor, other: Tensor) -> float:
    """Mean divergence of next-token distributions from those of full compute, in nats."""
    divergence = (truth.exp() * (truth - other)).sum(-1)
    return float(torch.clamp(divergence, min=0).mean())


# --- the table -------------------------------------------------------------------------------


def _result(
    asked: list[Asked],
    arms: dict[tuple[str, str], Arm],
    divergence: dict[tuple[str, str], list[float]],
    chat: Chat,
    options: Options,
    model: str,
) -> Result:
    metric = token_f1()
    by_tokens = token_f1(chat.tokens)
    references = [one.answers for one in asked]
    full = arms[FULL, ""].answers
    lengths = [len(one.request) for one in asked]
    rows: list[list[Cell]] = []
    series = {}
    for key in sorted(arms, key=lambda key: ["", SHUFFLED, REPLACING].index(key[1])):
        arm = arms[key]
        gap = paired_bootstrap(
            metric,
            metric.parts(arm.answers, references),
            metric.parts(full, references),
            seed=options.seed,
        )
        f1 = [_total(one, arm.answers, references) for one in (metric, by_tokens)]
        same = [a == b for a, b in zip(arm.answers, full, strict=True)]
        near = _total(metric, arm.answers, [(answer,) for answer in full])
        kl = sum(divergence[key]) / len(asked)
        reused = sum(arm.reused) / sum(lengths)
        interval = f"{gap.low:+.1f}…{gap.high:+.1f}{' *' if gap.clear else ''}"
        agreement = sum(same) / len(same)
        rows.append([arm.method, arm.donors or "-", *f1, interval, agreement, near, kl, reused])
        series[" ".join(key).strip()] = [kl, reused, arm.method, arm.donors]
    return Result(
        name="rag",
        title="MuSiQue, ten passages and a question",
        n={"questions": len(asked), "tokens of a prompt (mean)": sum(lengths) // len(lengths)},
        seed=options.seed,
        model=f"{model}, float32",
        noise_floor=(
            f"full compute in two chunks: {rows[1][5]:.0%} of the answers are the same, "
            f"KL {rows[1][7]:.2g}; in bf16: {rows[2][5]:.0%}, KL {rows[2][7]:.2g}"
        ),
        columns=[
            "method",
            "donors",
            "F1, words",
            "F1, tokens",
            "F1 minus full",
            "same answer",
            "F1 to full's answer",
            "KL",
            "tokens reused",
        ],
        rows=rows,
        notes=_notes(),
        series=series,
    )


def _total(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return metric.total(metric.parts(answers, references).sum(0))


def _notes() -> list[str]:
    return [
        "Questions and passages are CacheBlend's own sample (inputs/musique_s.json of its "
        f"repository). Each passage is cut to the {WORDS} words that share most with the question, "
        "without a look at the answer: at full length a prompt has 6,000 tokens, which takes this "
        "machine minutes. F1 is on words as in SQuAD (Rajpurkar et al. 2016) and on the model's "
        "tokens as in CacheBlend's scripts, both after SQuAD's normalisation, 0 to 100.",
        "The donor asks another question about the same passages in another order (shuffled), or "
        f"in the same order with {REPLACED} of them other ones (replaced). CacheBlend and EPIC "
        "were made for chunks that were computed alone; here a donor's rows have seen its context.",
        "No preset was chosen for this. Shuffled passages are many edits, each of them a passage "
        "long, and a question that depends on all of them: rows kept across them are further from "
        "full compute than on pairs of similar prompts (`agreement`).",
        "A model of 135M parameters finds few of the answers, so F1 says little. KL is the mean "
        "divergence of the next token's distribution over the tokens of full compute's answer.",
        "`F1 minus full`: where 95 % of the differences lie in a paired bootstrap over questions; "
        "* marks those that leave out zero.",
    ]


def draw(result: Result) -> Figure:
    """Divergence from full compute by method, one panel for a kind of donor."""
    from matplotlib.figure import Figure

    points = list(result.series.values())
    least = 1e-6
    noise = result.series[BF16][0]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, donors in zip(axes, (SHUFFLED, REPLACING), strict=True):
        some = [point for point in points if point[3] == donors]
        for at, (kl, _, method, _) in enumerate(some):
            filled = "black" if method.startswith("kvshare") else "white"
            axis.plot(max(kl, least), at, "o", color="black", markerfacecolor=filled)
        labels = [f"{method}, {reused:.0%} reused" for _, reused, method, _ in some]
        axis.set_yticks(range(len(some)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(noise, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_title(f"{donors} passages, n = {result.n['questions']}", fontsize=10)
        axis.set_xlabel("mean KL (nats); dashed: full, bf16")
    return figure
