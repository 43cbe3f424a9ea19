"""vLLM and the reference engine give the same answer for the same plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kvshare_connectors.transformers.decode import teacher_forced
from kvshare_connectors.transformers.engine import RowEngine
from kvshare_connectors.transformers.model import KVShareModel, Served

from kvshare_store.config import StoreConfig
from kvshare_store.store import Store
from tests.engine.harness import WITH_DEVICE_TIER, Answer, Engine, kept_engine
from tests.support.short_model import short_model

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CLOSE = 1e-3
"""How far log-probabilities of two fp32 engines on the same rows may differ."""
TOKENS = 8
Prompts = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return kept_engine(tmp_path_factory, **WITH_DEVICE_TIER)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVShareModel]:
    home: Path = tmp_path_factory.mktemp("reference")
    config = StoreConfig(
        home=str(home),
        policy="aggressive",
        semantic="never",
        host_bytes=512 << 20,
        min_saving_ms=-1e9,
        plan_deadline_ms=10_000,
    )
    with KVShareModel(RowEngine.load(short_model()).model, Store(config)) as model:
        yield model


def difference(model: KVShareModel, served: Served, answer: Answer) -> float:
    """Largest difference of a log-probability that vLLM reports, with vLLM's answer forced."""
    ours = teacher_forced(model.engine, served, answer.tokens)
    pairs = zip(ours, answer.logprobs, strict=True)
    return max(abs(float(row[token]) - value) for row, top in pairs for token, value in top.items())


@pytest.mark.parametrize(
    ("family", "policy"),
    [("support_ticket", "aggressive"), ("few_shot", "aggressive"), ("few_shot", "balanced")],
)
def test_the_engines_agree_on_an_edited_prompt(
    vllm: Engine, reference: KVShareModel, families: Prompts, family: str, policy: str
) -> None:
    donor, follower, *_ = families[family]
    vllm.clear()
    reference.store.clear()
    first = reference.prefill(donor)
    assert difference(reference, first, vllm.store(donor, max_tokens=TOKENS)) < CLOSE
    reference.save(first)

    served = reference.prefill(follower, policy=policy)
    answer = vllm.ask(follower, max_tokens=TOKENS, policy=policy)

    assert served.reused > len(follower) // 4
    ours = teacher_forced(reference.engine, served, answer.tokens)
    assert ours.argmax(-1).tolist() == answer.tokens
    assert difference(reference, served, answer) < CLOSE
    if policy == "aggressive":  # the control: full compute gives another answer
        full = reference.prefill(follower, policy="off")
        assert full.reused == 0
        assert difference(reference, full, answer) > 10 * CLOSE
