"""Table 1: blocks of prompts, and a baseline that is not installed."""

from __future__ import annotations

import pytest

from benchmarks.data.chat_prompts import Item, Task
from benchmarks.paper import table1_answers
from benchmarks.paper.table1_answers import BLOCK, blocks
from benchmarks.peers.environment import PeerMissingError
from benchmarks.quality.answer_metrics import rouge_l


@pytest.mark.parametrize("size", [1, 2, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 2])
def test_blocks_hold_every_prompt_once_by_length_and_no_prompt_alone(size):
    prompts = [[0] * ((7 * i) % 11 + 1) for i in range(size)]
    cut = list(blocks(prompts))
    order = [index for block in cut for index in block]
    assert sorted(order) == list(range(size))
    lengths = [len(prompts[index]) for index in order]
    assert lengths == sorted(lengths)
    assert size == 1 or min(map(len, cut)) > 1


def test_a_missing_gptcache_leaves_no_arm_that_other_tasks_lack(monkeypatch):
    def missing(*_):
        raise PeerMissingError("gptcache is not installed")

    monkeypatch.setattr(table1_answers, "GptCacheBaseline", missing)
    task = Task("task", "Do: {}", (Item("a", ("b",)), Item("c", ("d",))))
    asked = table1_answers.Asked(task, rouge_l(), [(1, 2), (3, 4)], ["Do: e", "Do: f"])
    asked.arm(table1_answers.FULL, "")
    with pytest.raises(PeerMissingError):
        table1_answers.answer_from_gptcache(asked)
    assert list(asked.arms) == [(table1_answers.FULL, "")]
