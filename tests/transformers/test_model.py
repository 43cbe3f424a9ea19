"""A model with a store: what is reused, what is computed, what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvshare_connectors.transformers.identity import fingerprint
from kvshare_connectors.transformers.model import KVShareModel

from kvshare_store.config import StoreConfig
from kvshare_store.errors import LeaseError, UnsupportedError
from kvshare_store.store import Store
from tests.transformers.tiny import prompt_of, tiny_model

DONOR = prompt_of(60)
EDITED = [*DONOR[:20], 7, 8, 9, *DONOR[22:]]
"""Two tokens became three: everything after them moved by one."""


@pytest.fixture
def open_model(home: Path) -> Iterator[Callable[..., KVShareModel]]:
    opened: list[KVShareModel] = []

    def open_(family: str = "LlamaConfig", **settings: Any) -> KVShareModel:
        config = {"home": str(home), "policy": "aggressive", "semantic": "never"} | settings
        small = {"block_tokens": 16, "host_bytes": 1 << 22, "min_saving_ms": -1e9}
        store = Store(StoreConfig(**(small | config)))
        opened.append(KVShareModel(tiny_model(family), store))
        return opened[-1]

    yield open_
    for model in opened:
        model.close()


def test_the_same_prompt_again_computes_one_row(
    open_model: Callable[..., KVShareModel], family: str
) -> None:
    model = open_model(family)
    first = model.prefill(DONOR)
    assert (first.reused, first.plan.declined) == (0, "empty_store")
    assert model.save(first) is not None
    again = model.prefill(DONOR)
    assert again.reused == len(DONOR) - 1
    assert torch.equal(again.cache.rows[:, :, :, :-1], first.cache.rows[:, :, :, :-1])
    torch.testing.assert_close(again.logits, first.logits, atol=1e-4, rtol=0)


def test_an_edited_prompt_computes_its_gaps(
    open_model: Callable[..., KVShareModel], family: str
) -> None:
    model = open_model(family)
    donor = model.prefill(DONOR)
    model.save(donor)
    served = model.prefill(EDITED)
    assert served.reused == len(DONOR) - 3  # two were replaced, the last is always computed
    old, new = donor.cache.rows[:, :, 0], served.cache.rows[:, :, 0]
    assert torch.equal(new[:, :, :20], old[:, :, :20])
    assert torch.equal(new[:, 1, 23:-1], old[:, 1, 22:-1])
    # the first layer has no context, so moved K must be what full prefill computes there
    full, logits = model.engine.prefill(EDITED)
    torch.testing.assert_close(new[0], full.rows[0, :, 0], atol=1e-4, rtol=0)
    assert (served.logits - logits).abs().max() > 1e-3  # rows after the edit know the old tokens


def test_edited_rows_are_stored_as_edited(open_model: Callable[..., KVShareModel]) -> None:
    model = open_model()
    model.save(model.prefill(DONOR))
    node = model.save(model.prefill(EDITED))
    assert node is not None
    stored = model.store.tree.get(node)
    assert stored is not None
    # the edit itself was computed behind exact rows only
    assert (stored.generation, stored.exact_rows) == (1, 23)


def test_a_stricter_policy_may_be_asked_for(open_model: Callable[..., KVShareModel]) -> None:
    model = open_model()
    model.save(model.prefill(DONOR))
    assert model.prefill(EDITED, policy="exact").reused == 20


def test_tenants_share_nothing(open_model: Callable[..., KVShareModel]) -> None:
    model = open_model()
    model.save(model.prefill(DONOR, tenant="a"))
    assert model.prefill(DONOR, tenant="b").reused == 0
    assert model.prefill(DONOR, tenant="a").reused == len(DONOR) - 1


def test_a_plan_that_cannot_be_loaded_is_a_miss(
    open_model: Callable[..., KVShareModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model()
    model.save(model.prefill(DONOR))

    def lost(*_: Any) -> None:
        raise LeaseError("gone")

    monkeypatch.setattr(model.store, "rows_of", lost)
    served = model.prefill(EDITED)
    assert (served.reused, served.plan.declined) == (0, "load_lease")
    full, logits = model.engine.prefill(EDITED)
    assert torch.equal(served.cache.rows, full.rows)
    assert torch.equal(served.logits, logits)
    assert model.store.stats()["leases"] == 0


def test_generating_with_and_without_the_store_agrees(
    open_model: Callable[..., KVShareModel],
) -> None:
    model = open_model()
    first = model.generate(DONOR, 8)
    again = model.generate(DONOR, 8)
    assert (first.reused, again.reused) == (0, len(DONOR) - 1)
    assert first.tokens == again.tokens
    assert len(first.tokens) == 8


def test_it_stops_before_a_stop_token(open_model: Callable[..., KVShareModel]) -> None:
    model = open_model()
    answer = model.generate(DONOR, 8).tokens
    stop = answer[3]
    assert model.generate(DONOR, 8, stop=[stop]).tokens == answer[: answer.index(stop)]


def test_other_weights_are_another_namespace() -> None:
    model = tiny_model("LlamaConfig")
    before = fingerprint(model)
    assert fingerprint(tiny_model("LlamaConfig")) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(model) != before


def test_text_without_a_tokenizer_is_refused(open_model: Callable[..., KVShareModel]) -> None:
    with pytest.raises(UnsupportedError, match="pass token ids"):
        open_model().generate("Some text")
