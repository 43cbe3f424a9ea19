"""bf16, the precision of most deployments, on the paged layout that vLLM chooses on this
processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from examples.engines.small_model import prepare_model
from tests.engine.harness import BLOCK, Engine
from tests.support.paged import rows_at

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("home"), dtype="bfloat16", model=str(prepare_model()))
    yield engine
    engine.close()


def test_rows_of_an_exact_hit_are_the_saved_bits(
    engine: Engine, families: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = families["book_character"][0]
    worker, rows = engine.worker, {}
    snapshot, load = worker.snapshot, worker.load_one

    def read(block_ids: list[int]) -> torch.Tensor:
        positions = torch.arange(len(prompt) - 1)
        slots = torch.tensor(block_ids)[positions // BLOCK] * BLOCK + positions % BLOCK
        return rows_at(worker.cache, slots).view(torch.int16)

    def saving(spec: Any) -> Any:
        rows["saved"] = read(spec.block_ids)
        return snapshot(spec)

    def loading(spec: Any) -> int:
        nbytes = load(spec)
        rows["loaded"] = read(spec.block_ids)
        return nbytes

    monkeypatch.setattr(worker, "snapshot", saving)
    monkeypatch.setattr(worker, "load_one", loading)
    assert worker.cache.layout.dtype == "bfloat16"
    engine.store(prompt)
    with engine.counted() as gained:
        engine.ask(prompt, policy="exact")
    assert gained["tokens_reused_exact"] == len(prompt) - 1
    assert torch.equal(rows["loaded"], rows["saved"])


def test_followers_of_a_long_prompt_begin_as_with_full_prefill(
    engine: Engine, families: dict[str, list[list[int]]]
) -> None:
    """The default policy on a real prompt: most rows are reused, and the first token is mostly the
    same."""
    donor, *followers = families["medical_report"]
    engine.clear()
    engine.store(donor, max_tokens=1)
    same = []
    for follower in followers:
        full = engine.ask(follower, policy="off", max_tokens=1)
        with engine.counted() as gained:
            answer = engine.ask(follower, max_tokens=1)
        assert gained["hits_edited"] == 1
        reused = gained["tokens_reused_exact"] + gained["tokens_reused_edited"]
        assert reused > len(follower) // 2
        assert reused + gained["tokens_recomputed"] == len(follower)
        same.append(answer.tokens == full.tokens)
    assert sum(same) > len(same) / 2
    engine.check_idle()
