"""What a request can rely on beside vLLM's own prefix cache: exact rows, no wrong rows in that
cache, policies."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kvshare_store.plan.spans import reused_of
from tests.engine.harness import BLOCK, SHARED, TOLERANCE, Engine, Fresh
from tests.engine.soak import Traffic, related_prompts
from tests.support.paged import rows_at

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 112
"""Tokens of a prompt here: three and a half blocks."""
EDIT = 44
"""Where followers differ from their donor: inside the second block."""
LATE_EDIT = 98
"""A position inside the last block, which is not full."""
NEW = [11111, 22222, 33333, 44444, 12345]
"""The tokens of the edit; rare ones. What follows them is reused."""
SETTINGS = SHARED


@pytest.fixture
def donor(fresh: Fresh) -> list[int]:
    return fresh(LENGTH)


@pytest.fixture
def follower(donor: list[int]) -> list[int]:
    """The donor with three tokens replaced and two inserted behind them."""
    return edited(donor, EDIT)


def edited(prompt: list[int], at: int) -> list[int]:
    return [*prompt[:at], *NEW, *prompt[at + 3 :]]


def blocks_below(position: int) -> int:
    """Tokens of the whole blocks before a position."""
    return position // BLOCK * BLOCK


# --- exactness ------------------------------------------------------------------------------------


@pytest.fixture
def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rows in the paged cache: of the last `saved` prompt, and those `loaded`, right after the
    load."""
    worker, rows = engine.worker, {}
    snapshot, load = worker.snapshot, worker.load_one

    def read(block_ids: list[int], positions: torch.Tensor) -> torch.Tensor:
        slots = torch.tensor(block_ids)[positions // BLOCK] * BLOCK + positions % BLOCK
        return rows_at(worker.cache, slots)

    def saving(spec: Any) -> Any:
        positions = torch.arange(len(spec.tokens) // 4)
        rows["saved"] = read(spec.block_ids, positions)
        return snapshot(spec)

    def loading(spec: Any) -> int:
        nbytes = load(spec)
        exact = torch.arange(spec.start, spec.start + reused_of(spec.plan.spans).exact)
        rows["loaded"], rows["positions"] = read(spec.block_ids, exact), exact
        return nbytes

    monkeypatch.setattr(worker, "snapshot", saving)
    monkeypatch.setattr(worker, "load_one", loading)
    return rows


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_rows_of_an_exact_hit_are_the_saved_bits(
    engine: Engine, donor: list[int], watched: dict[str, Any]
) -> None:
    full = engine.store(donor)
    saved = watched["saved"]
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(donor, policy="exact")
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LENGTH - 1
    assert same_bits(watched["loaded"], saved[:, :, : LENGTH - 1])
    assert answer.agrees(full)


def test_the_exact_prefix_of_an_edited_plan_is_the_saved_bits(
    engine: Engine, donor: list[int], follower: list[int], watched: dict[str, Any]
) -> None:
    engine.store(donor)
    saved = watched["saved"]
    engine.forget()
    with engine.counted() as gained:
        engine.ask(follower)
    assert gained["hits_edited"] == 1
    assert gained["tokens_reused_edited"] > LENGTH // 4
    assert len(watched["positions"]) == EDIT == gained["tokens_reused_exact"]
    assert same_bits(watched["loaded"], saved[:, :, :EDIT])


# --- vLLM's prefix cache --------------------------------------------------------------------------


@pytest.mark.parametrize("parked", [False, True], ids=["same step", "parked"])
@pytest.mark.parametrize("at", [EDIT, LATE_EDIT], ids=["in the middle", "in the last block"])
def test_edited_rows_are_not_shared(
    engine: Engine, donor: list[int], at: int, parked: bool
) -> None:
    follower = edited(donor, at)
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained, engine.budget(tokens=4) if parked else nullcontext():
        approximate = engine.store(follower)
    assert gained["hits_edited"] == 1
    assert max(len(step.runs) for step in engine.steps) > 0
    plain = engine.ask(follower, policy="off")
    assert plain.cached == blocks_below(at + len(NEW))
    engine.forget()
    full = engine.ask(follower, policy="off")
    assert full.cached == 0
    assert plain.agrees(full)
    assert approximate.difference(full) > TOLERANCE  # sharing its rows would have been seen


@pytest.mark.parametrize("at", [EDIT, LATE_EDIT], ids=["in the middle", "in the last block"])
def test_what_was_generated_from_edited_rows_is_not_shared(
    engine: Engine, donor: list[int], at: int
) -> None:
    follower = edited(donor, at)
    turn = BLOCK - len(follower) % BLOCK + 2  # the answer fills the last block and begins another
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(follower, max_tokens=turn)
    assert gained["hits_edited"] == 1
    conversation = [*follower, *answer.tokens, *donor[:3]]
    plain = engine.ask(conversation, policy="off")
    assert plain.cached == blocks_below(at + len(NEW))
    engine.forget()
    full = engine.ask(conversation, policy="off")
    assert plain.agrees(full)


def test_exact_rows_are_shared(engine: Engine, donor: list[int]) -> None:
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        engine.ask(donor)
    assert gained["hits_exact"] == 1
    longer = [*donor, *donor[:9]]
    with engine.counted() as gained:
        again = engine.ask(longer, policy="off")
    assert gained["hits_exact"] == 0
    assert again.cached == blocks_below(LENGTH)
    engine.forget()
    assert again.agrees(engine.ask(longer, policy="off"))


def test_the_local_prefix_is_not_loaded_again(engine: Engine, donor: list[int]) -> None:
    engine.store(donor)
    longer = [*donor[:70], *donor[20:60]]
    with engine.counted() as gained:
        answer = engine.ask(longer)
    assert answer.cached >= blocks_below(70)
    assert gained["tokens_reused_exact"] < BLOCK
    engine.forget()
    assert answer.agrees(engine.ask(longer, policy="off")) or gained["hits_edited"]


def test_every_requested_token_is_counted_once(
    engine: Engine, donor: list[int], follower: list[int]
) -> None:
    """Including vLLM's own prefix cache: for a miss, a hit, and a plan that it makes needless."""
    parts = ("reused_exact", "reused_edited", "recomputed", "engine_cached")
    with engine.counted() as gained:
        engine.ask(donor)  # nothing is stored
        engine.ask(donor)  # vLLM's own cache has nearly all of it
        engine.ask(donor, policy="off")
        engine.ask(follower)
    assert gained["tokens_requested"] == 3 * len(donor) + len(follower)
    assert sum(gained[f"tokens_{part}"] for part in parts) == gained["tokens_requested"]
    assert gained["tokens_engine_cached"] >= 2 * blocks_below(len(donor) - 1)
    assert gained["tokens_reused_edited"]


def test_what_vllm_holds_already_is_stored_once(engine: Engine, donor: list[int]) -> None:
    """A plan that vLLM's own cache makes needless still tells what is already stored."""
    whole = donor[: blocks_below(LENGTH)]
    engine.store(whole)
    longer = [*whole, *donor[:40]]
    with engine.counted() as gained:
        answer = engine.store(longer, policy="exact", max_tokens=1)
    assert answer.cached == len(whole)
    assert gained["declined.engine_prefix"] == gained["nodes"] == 1
    assert gained["bytes_stored"] == 40 * engine.worker.cache.layout.row_bytes
    engine.forget()
    with engine.counted() as gained:
        again = engine.ask(longer, policy="exact", max_tokens=1)
    assert gained["tokens_reused_exact"] == len(longer) - 1
    engine.forget()
    assert again.agrees(engine.ask(longer, policy="off", max_tokens=1))


def test_few_rows_of_a_block_are_stored_anew(engine: Engine, fresh: Fresh) -> None:
    """Else the prompt would keep the whole block for them."""
    block = engine.planning.config.block_tokens
    donor, row_bytes = fresh(4 * block), engine.worker.cache.layout.row_bytes
    engine.store(donor)
    for shared, rows in ((block // 8, 2 * block + block // 8), (block // 2, 2 * block)):
        other = [*donor[: block + shared], *fresh(2 * block)]
        engine.forget()
        with engine.counted() as gained:
            engine.store(other, policy="exact", max_tokens=1)
        assert gained["tokens_reused_exact"] == block + shared
        assert gained["bytes_stored"] == rows * row_bytes
        engine.forget()
        again = engine.ask(other, policy="exact", max_tokens=1)
        assert again.agrees(engine.ask(other, policy="off", max_tokens=1))


def test_a_request_that_waits_for_room_becomes_private_once(
    engine: Engine, donor: list[int], follower: list[int]
) -> None:
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        with engine.room(2):
            engine.add(follower)
            for _ in range(3):
                engine.step()
            state = next(iter(engine.planning.states.values()))
            hasher = state.request._block_hasher
            engine.step()
            assert state.plan is not None
            assert state.request._block_hasher is hasher
        engine.drain()
    assert gained["hits_edited"] == 1


# --- policies -------------------------------------------------------------------------------------


def test_a_request_may_ask_for_exact_rows_only(engine: Engine, fresh: Fresh) -> None:
    donor = fresh(LENGTH)
    follower = edited(donor, LATE_EDIT)
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.store(follower, policy="exact")
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LATE_EDIT
    assert gained["tokens_reused_edited"] == gained["hits_edited"] == 0
    engine.forget()
    assert answer.agrees(engine.ask(follower, policy="off"))


def test_a_request_may_ask_for_a_stricter_policy(engine: Engine, fresh: Fresh) -> None:
    donor = fresh(240)  # a faithful policy keeps nothing behind the edit of a short prompt
    follower = edited(donor, EDIT)
    engine.store(donor)
    reused = []
    for policy in ("aggressive", "faithful"):
        engine.forget()
        with engine.counted() as gained:
            engine.ask(follower, policy=policy)
        reused.append(gained["tokens_reused_edited"])
        engine.clear()
        engine.store(donor)
    assert 0 < reused[1] < reused[0]


def test_off_neither_looks_up_nor_stores(engine: Engine, donor: list[int]) -> None:
    engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        engine.store(donor, policy="off")
        engine.store(donor[:90][::-1], policy="off")
    assert gained["declined.policy_off"] == 2
    assert gained["hits_exact"] == gained["hits_edited"] == gained["nodes"] == 0


def test_an_unknown_policy_is_answered_without_reuse(engine: Engine, donor: list[int]) -> None:
    full = engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(donor, policy="careless")
    assert gained["declined.unknown_policy"] == 1
    assert gained["hits_exact"] == 0
    assert answer.agrees(full)


@pytest.mark.parametrize(
    "params",
    [
        {"kvshare.donor": "x", "kvshare.reused": 10**9, "kvshare.reason": ["x"]},
        {"kvshare.policy": None, "do_remote_prefill": False, "home": "/nowhere"},
        {"min_saving_ms": 1e9, "cache_salt": "other", "": {}},
        {},
    ],
)
def test_nothing_else_that_a_client_sends_steers_anything(
    engine: Engine, donor: list[int], params: dict[str, Any]
) -> None:
    full = engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(donor, params=params)
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LENGTH - 1
    assert answer.agrees(full)


def test_a_policy_of_the_wrong_type_is_declined(engine: Engine, donor: list[int]) -> None:
    full = engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(donor, params={"kvshare.policy": ["exact", 3]})
    assert gained["declined.unknown_policy"] == 1
    assert answer.agrees(full)


def test_a_salt_is_a_wall(engine: Engine, donor: list[int]) -> None:
    hits = {}
    engine.store(donor, salt="one")
    for salt in ("one", "two", None):
        engine.forget()
        with engine.counted() as gained:
            engine.ask(donor, salt=salt)
        hits[salt] = gained["hits_exact"] + gained["hits_edited"]
    assert hits == {"one": 1, "two": 0, None: 0}


def test_no_salt_is_a_namespace_of_its_own(engine: Engine, donor: list[int]) -> None:
    engine.store(donor)
    hits = {}
    for salt in ("one", None):
        engine.forget()
        with engine.counted() as gained:
            engine.ask(donor, salt=salt)
        hits[salt] = gained["hits_exact"]
    assert hits == {"one": 0, None: 1}


def test_prompt_logprobs_are_computed_in_full(engine: Engine, donor: list[int]) -> None:
    full = engine.store(donor)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(donor, prompt_logprobs=1)
    assert gained["declined.prompt_logprobs"] == 1
    assert gained["hits_exact"] == 0
    assert answer.agrees(full)


# --- everything together --------------------------------------------------------------------------


def test_random_traffic(engine: Engine, fresh: Fresh) -> None:
    traffic = Traffic(engine, related_prompts(fresh(124)), seed=1)
    with engine.counted() as gained:
        for _ in range(5):
            traffic.batch()
    assert gained["hits_edited"]
