"""Table 1: are answers as good when KV is reused? BLEU on WMT19, Rouge-L on SAMSum.

Donors both ways: `another` is the same instruction with another text, so that only the template
can be reused; `near` is the same text with a small change. The reference stays that of the request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.data.chat_prompts import EDITS, summaries, translation
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.methods.base import Method
from benchmarks.methods.compared import BF16, FULL, NOISE, Arm, engine_for, lineup, steps
from benchmarks.paper.table1_answers import (
    ANOTHER,
    NEAR,
    Asked,
    answer_block,
    answer_from_gptcache,
    answer_in_bf16,
    asked_of,
    blocks,
)
from benchmarks.peers.environment import PeerMissingError
from benchmarks.quality.answer_metrics import bleu, paired_bootstrap, rouge_l

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = (
    "Table 1 (scores from 0 to 1, n not given): full compute, prefix caching, KVShare, GPTCache. "
    "Qwen2.5-7B: WMT19 BLEU 0.380, 0.375, 0.358, 0.040; SAMSum Rouge-L 0.223, 0.225, 0.293, 0.152. "
    "Llama3-8B: BLEU 0.348, 0.353, 0.357, 0.010; Rouge-L 0.232, 0.235, 0.236, 0.054."
)


def measure(options: Options) -> Result:
    """Every method's answers to every task, scored."""

    def methods(engine: RowEngine) -> list[Method]:
        return lineup(engine, short=options.short)

    return scored(options, "table1", options.size(45, 2), methods)


def scored(
    options: Options, name: str, n: int, methods_of: Callable[[RowEngine], list[Method]]
) -> Result:
    """The answers of some methods to `n` prompts of every task, scored."""
    engine, chat, model = engine_for(options)
    translated, signature = bleu()
    tasks = [
        (translation(options.data, "zh-en", n, options.seed), translated),
        (translation(options.data, "de-en", n, options.seed), translated),
        (summaries(options.data, n, options.seed), rouge_l()),
    ]
    asked = [asked_of(task, metric, chat) for task, metric in tasks]
    methods = methods_of(engine)
    total = sum(len(one.prompts) for one in asked)
    with steps("Answering", total) as step:
        for one in asked:
            for block in blocks(one.prompts):
                answer_block(engine, chat, methods, one, block)
                step(len(block))
    del engine
    half, _, _ = engine_for(options, torch.bfloat16)
    notes = []
    with steps("Answering in bf16", total) as step:
        for one in asked:
            for block in blocks(one.prompts):
                answer_in_bf16(half, chat, one, block)
                step(len(block))
    try:
        for one in asked:
            answer_from_gptcache(one)
    except PeerMissingError as error:
        notes.append(f"GPTCache was not measured: {error}")
    return _result(name, asked, options, model, signature, notes)


def _result(
    name: str, asked: list[Asked], options: Options, model: str, signature: str, notes: list[str]
) -> Result:
    for one in asked:
        one.arms.pop((FULL, "to the donor"), None)
    columns = ["method", "donors"]
    for one in asked:
        columns += [f"{one.task.name} {one.metric.name}", "minus full"]
    columns += ["same answer", "reused, of all", "where any"]
    keys = [key for donors in ("", ANOTHER, NEAR) for key in asked[0].arms if key[1] == donors]
    rows, points = [], []
    for key in keys:
        row, point = _row([one.arms[key] for one in asked], asked, options.seed)
        rows.append(row)
        points.append(point)
    noise = rows[keys.index((NOISE, ""))]
    half = rows[keys.index((BF16, ""))]
    return Result(
        name=name,
        title="Table 1: answer quality, greedy, at most 64 new tokens",
        n={one.task.name: len(one.prompts) for one in asked},
        seed=options.seed,
        model=f"{model}, float32",
        noise_floor=(
            f"full compute again, prefilled in two chunks and decoded in another batching: "
            f"{noise[-3]:.0%} of the answers are the same; full compute in bf16: {half[-3]:.0%}"
        ),
        columns=columns,
        rows=rows,
        paper=PAPER,
        notes=[*_notes(signature), *notes],
        series={"tasks": [f"{one.task.name} {one.metric.name}" for one in asked], "arms": points},
    )


def _row(arms: list[Arm], asked: list[Asked], seed: int) -> tuple[list[Cell], dict[str, Any]]:
    """One line of the table, and what the plot needs of it."""
    row: list[Cell] = [arms[0].method, arms[0].donors or "-"]
    point: dict[str, Any] = {"method": arms[0].method, "donors": arms[0].donors, "tasks": []}
    for one, arm in zip(asked, arms, strict=True):
        full = one.arm(FULL, "")
        references = [item.references for item in one.task.items]
        parts = one.metric.parts(arm.answers, references)
        baseline = one.metric.parts(full.answers, references)
        gap = paired_bootstrap(one.metric, parts, baseline, seed=seed)
        mark = " *" if gap.clear else ""
        row += [
            one.metric.total(parts.sum(0)),
            f"{gap.low:+.1f}…{gap.high:+.1f}{mark}",
        ]
        point["tasks"].append(list(gap))
    full_answers = [answer for one in asked for answer in one.arm(FULL, "").answers]
    answers = [answer for arm in arms for answer in arm.answers]
    same = sum(a == b for a, b in zip(answers, full_answers, strict=True)) / len(answers)
    lengths = [len(prompt) for one in asked for prompt in one.prompts]
    reused = [count for arm in arms for count in arm.reused]
    some = sum(length for length, count in zip(lengths, reused, strict=True) if count)
    row += [same, sum(reused) / sum(lengths), sum(reused) / some if some else None]
    return row, point


def _notes(signature: str) -> list[str]:
    edits = ", ".join(edit.name for edit in EDITS)
    return [
        f"sacrebleu signature: {signature}; rouge_score rougeL F, stemmer. Scores from 0 to 100.",
        "`minus full` is where 95 % of the differences lie in a paired bootstrap over prompts "
        "(1,000 resamples); * marks those that leave out zero. Of twenty such "
        "intervals, one does so by chance.",
        "A model of 135M parameters hardly translates: a BLEU near 1 is that of text that has few "
        "words in common with the reference by chance, and a change of it says nothing about a "
        "loss of quality; neither does Rouge-L at a small n. The column that does "
        "is the share of answers that are, letter for letter, those of full compute.",
        f"Near-duplicates take turns in how they differ from the request: {edits} "
        "(benchmarks/data/chat_prompts.py says what each is). The donor has the change, the "
        "request is the original.",
        "`same answer`: letter for letter that of full compute. `reused, of all`: tokens reused by "
        "tokens of all prompts; `where any`: by those of the prompts that reused some.",
        "GPTCache returns stored answers: `tokens reused` are those of prompts that it answered. "
        "With another text, half of the prompts ask a store that holds the other half.",
    ]


def draw(result: Result) -> Figure:
    """Each method's loss against full compute with its interval, one panel for a task."""
    from matplotlib.figure import Figure

    tasks, arms = result.series["tasks"], result.series["arms"]
    figure = Figure(figsize=(4 * len(tasks), 0.3 * len(arms) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    labels = [f"{a['method']} ({a['donors']})" if a["donors"] else a["method"] for a in arms]
    for panel, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        for at, arm in enumerate(arms):
            difference, low, high = arm["tasks"][panel]
            filled = "black" if low > 0 or high < 0 else "white"
            axis.plot([low, high], [at, at], color="0.4", linewidth=1.2)
            axis.plot(difference, at, "o", color="black", markerfacecolor=filled, markersize=5)
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(f"{task}, n = {list(result.n.values())[panel]}", fontsize=10)
        axis.set_xlabel("minus full compute (95 %)")
    axes[0].set_yticks(range(len(arms)), labels, fontsize=8)
    axes[0].invert_yaxis()
    return figure
