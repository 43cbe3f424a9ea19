"""Partial prefill is exact: whatever the placeholders held before, the answer is full prefill's."""

from __future__ import annotations

import pytest
import torch

from tests.engine.harness import TOLERANCE, WITH_DEVICE_TIER, Answer, Engine, Keep, random_runs

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


SETTINGS = WITH_DEVICE_TIER


@pytest.fixture
def prompt(families: dict[str, list[list[int]]]) -> list[int]:
    return families["medical_report"][0]


def serve_with(engine: Engine, prompt: list[int], keep: Keep) -> Answer:
    """Serve a stored prompt as if only `keep` could be reused; placeholders start as noise."""
    with engine.counted() as gained, engine.keeping(keep):
        answer = engine.ask(prompt)
    assert gained["hits_edited"] == 1
    return answer


def test_everything_recomputed_over_noise_is_full_prefill(
    engine: Engine, prompt: list[int]
) -> None:
    full = engine.store(prompt, policy="exact")
    one = len(prompt) - 2
    answer = serve_with(engine, prompt, [(one, one + 1)])
    assert answer.tokens == full.tokens
    assert answer.difference(full) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_random_runs_over_the_prompts_own_rows(
    engine: Engine, prompt: list[int], seed: int
) -> None:
    full = engine.store(prompt, policy="off")
    engine.store(prompt)
    answer = serve_with(engine, prompt, random_runs(len(prompt), seed))
    assert answer.tokens == full.tokens
    assert answer.difference(full) < TOLERANCE


def test_one_noisy_row_left_in_place_would_be_seen(engine: Engine, prompt: list[int]) -> None:
    """The control: noise left in a single row changes the answer, so the tests above cannot pass by
    accident."""
    full = engine.store(prompt, policy="off")
    engine.store(prompt)
    worker = engine.worker
    write = worker.cache.write

    def spoiled(rows, slots):
        write(rows, slots)
        write(torch.randn(worker.cache.layout.shape(1)) * 50.0, slots[5:6])

    worker.cache.write = spoiled
    try:
        answer = engine.ask(prompt)
    finally:
        worker.cache.write = write
    assert answer.tokens != full.tokens or answer.difference(full) > 20 * TOLERANCE, engine.stats()
