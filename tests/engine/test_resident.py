"""Blocks that a worker keeps on its device: reused from there, the rows are the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvshare_store.daemon import protocol
from tests.engine.harness import BLOCK, WITH_DEVICE_TIER, Answer, Engine, Fresh
from tests.support.paged import rows_at

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SETTINGS = WITH_DEVICE_TIER
LENGTH = 150
TIMES = 5


@pytest.fixture
def loads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int]]:
    """For each load: the rows in the paged cache right after it, and how many blocks were read from
    the arena."""
    worker, found = engine.worker, []
    load, gathered = worker.load_one, worker.editor.gathered

    def read(spec: Any) -> torch.Tensor:
        places = [
            at for span in spec.plan.spans for at in range(span.start, span.start + span.length)
        ]
        positions, blocks = torch.tensor(places), torch.tensor(spec.block_ids)
        return rows_at(worker.cache, blocks[positions // BLOCK] * BLOCK + positions % BLOCK)

    def loading(spec: Any) -> int:
        from_arena: list[str] = []

        def counting(spans: Any, refs: Any, rows_of: Any, resident: Any) -> torch.Tensor:
            from_arena.extend(
                ref.name for ref, held in zip(refs, resident, strict=True) if held is None
            )
            return gathered(spans, refs, rows_of, resident)

        with monkeypatch.context() as patch:
            patch.setattr(worker.editor, "gathered", counting)
            nbytes = load(spec)
        found.append((read(spec), len(from_arena)))
        return nbytes

    monkeypatch.setattr(worker, "load_one", loading)
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def ask_often(engine: Engine, prompt: list[int], **options: Any) -> list[Answer]:
    return [engine.ask(prompt, **options) for _ in range(TIMES)]


@pytest.mark.parametrize("edited", [False, True], ids=["exact", "edited"])
def test_what_is_reused_often_comes_from_the_device_bit_for_bit(
    engine: Engine, fresh: Fresh, loads: list[tuple[torch.Tensor, int]], edited: bool
) -> None:
    donor = fresh(LENGTH)
    engine.clear()
    full = engine.store(donor)
    resident = engine.worker.resident.tier
    assert resident is not None
    before = set(resident.names())
    # the follower's own rows are not stored: it is served from the donor's every time
    prompt = [*donor[:44], 11111, 22222, *donor[47:]] if edited else donor
    with pytest.MonkeyPatch.context() as patch, engine.counted() as gained:
        patch.setattr(engine.planning.orders, "save", lambda *_: None)
        answers = ask_often(engine, prompt)
    assert gained["hits_edited" if edited else "hits_exact"] == TIMES
    rows, from_arena = zip(*loads, strict=True)
    assert len(rows) == TIMES
    became = set(resident.names()) - before
    assert len(became) == from_arena[0] > 1
    assert from_arena == (from_arena[0], from_arena[0], *[0] * (TIMES - 2))
    assert all(same_bits(one, rows[0]) for one in rows)
    assert all(answer.tokens == answers[0].tokens for answer in answers)
    assert all(answer.difference(answers[0]) == 0 for answer in answers)
    if not edited:
        assert answers[0].agrees(full)
    engine.check_idle()


def test_after_a_purge_the_next_request_of_anybody_empties_the_device(
    engine: Engine, fresh: Fresh
) -> None:
    donor = fresh(LENGTH)
    engine.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.planning.orders, "save", lambda *_: None)
        ask_often(engine, fresh(LENGTH))  # whatever was purged before has been heard of
    engine.store(donor)
    ask_often(engine, donor)
    tier = engine.worker.resident.tier
    assert tier is not None
    engine.settle()
    done = engine.client.call(protocol.Purge(engine.planning.namespace.digest, patience=20.0))
    assert [one["remaining"] for one in done] == [[]]
    places = [tier.rows(name) for name in tier.names()]
    assert places, "the daemon cannot reach it"
    engine.ask(fresh(40), salt="somebody else")
    assert tier.names() == []
    assert not any(place is None or place.view(torch.uint8).any() for place in places)
