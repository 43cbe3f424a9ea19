"""Answers checked against drafts equal those of greedy decoding, whatever the drafts say."""

from __future__ import annotations

import pytest
import torch
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import full_compute, generate
from benchmarks.quality.drafted_answers import drafted
from tests.transformers.tiny import tiny_model

NEW = 12


@pytest.fixture(scope="module")
def engine() -> RowEngine:
    """A tiny Llama with random weights."""
    return RowEngine(tiny_model("LlamaConfig"))


@pytest.fixture(scope="module")
def prompts(engine):
    """Prompts of different lengths, prefilled."""
    draw = torch.Generator().manual_seed(3)
    vocabulary = engine.model.config.vocab_size
    lengths = (5, 9, 6, 12, 7)
    return [
        full_compute(engine, torch.randint(vocabulary, (length,), generator=draw).tolist())
        for length in lengths
    ]


def test_any_draft_gives_the_greedy_answer(engine, prompts):
    greedy = [generate(engine, [prompt], NEW)[0] for prompt in prompts]
    wrong = (greedy[3][5] + 1) % engine.model.config.vocab_size
    drafts = [
        greedy[0],  # right to the end
        [],  # nothing drafted
        greedy[2][:4],  # right, and too short
        [*greedy[3][:5], wrong, *greedy[3][6:]],  # wrong in the middle
        [*greedy[4], 1, 2, 3],  # goes on for too long
    ]
    assert drafted(engine, prompts, drafts, NEW, batch=2) == greedy


def test_an_answer_ends_where_the_stop_token_comes(engine, prompts):
    greedy = [generate(engine, [prompt], NEW)[0] for prompt in prompts]
    stop = {greedy[0][4], greedy[1][0]}
    stopped = [generate(engine, [prompt], NEW, stop)[0] for prompt in prompts]
    assert len(stopped[1]) == 0
    assert drafted(engine, prompts, greedy, NEW, stop) == stopped
    assert drafted(engine, prompts, [[]] * len(prompts), NEW, stop) == stopped


def test_prompts_can_be_asked_again(engine, prompts):
    before = prompts[0].cache.rows.clone()
    drafted(engine, prompts[:1], [generate(engine, prompts[:1], NEW)[0]], NEW)
    assert torch.equal(prompts[0].cache.rows, before)
