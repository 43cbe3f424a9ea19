"""Step by step on vLLM's real scheduler objects: what is placed, counted and freed."""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvshare_connectors.vllm.connector as connector_module
import msgspec
import numpy as np
import pytest
import vllm.model_executor.models.registry as registry
from kvshare_connectors.vllm.metadata import SaveSpec
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

import kvshare_store.daemon.link as link_module
from kvshare_store.daemon import protocol
from kvshare_store.errors import ConfigError, DeadlineError
from kvshare_store.plan import BlockRef, Outcome
from kvshare_store.plan.spans import Run, Span
from kvshare_store.save.staging import Reuse, contexts_of_rows
from tests.engine.schedulers import (
    BLOCK,
    LENGTH,
    PLAN,
    Bench,
    FakeLink,
    kvshare_alone,
    runs_of,
    tiny_model,
)

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

Make = Callable[..., Bench]
OFF = {"kvshare.policy": "off"}


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    """The link from which every scheduler here gets its plans."""
    link = FakeLink()
    link.client = SimpleNamespace(greeted=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(link_module, "open_link", lambda config: link)
    return link


@pytest.fixture
def make(tmp_path: Path, link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    model = tiny_model(tmp_path / "model")

    def made(transfer: dict[str, Any] | None = None, **options: Any) -> Bench:
        return Bench(model, transfer or kvshare_alone(tmp_path / "home"), **options)

    return made


def sibling(name: str, module: str, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def beside(tmp_path: Path, *others: dict[str, Any], failures: str = "recompute") -> dict[str, Any]:
    """MultiConnector with others first and KVShare last."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": failures,
        "kv_connector_extra_config": {
            "connectors": [*others, kvshare_alone(tmp_path / "home")],
        },
    }


# --- rows of the batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [0, 1])
def test_requests_that_a_step_leaves_out_keep_their_rows(
    make: Make, link: FakeLink, streaming: int
) -> None:
    """vLLM's V2 runner has a slot for each running request, scheduled or not, and for sessions that
    wait for more input. Virtual rows get the remaining slots."""
    spans = tuple(Span(at, 8, at, 0, at) for at in range(0, 80, 10))
    link.plan = msgspec.structs.replace(PLAN, exact=0, spans=spans)
    bench = make(max_num_seqs=4, max_num_batched_tokens=64)
    for _ in range(2):
        bench.add(range(500, 510), max_tokens=50, params=OFF)
    bench.step()
    bench.scheduler.max_num_scheduled_tokens = 4
    parked, _ = bench.add(), bench.add(range(200, 300))
    bench.step()
    assert len(bench.planning.runs.parked) == 2
    bench.scheduler.max_num_scheduled_tokens = 64
    bench.scheduler.num_waiting_for_streaming_input = streaming
    bench.scheduler.running[0].next_decode_eligible_step = 10**9  # left out from now on
    for _ in range(16):
        output = bench.step()
        running = len(bench.scheduler.running)
        assert len(runs_of(output)) <= 4 - running - streaming
        if parked.status == RequestStatus.RUNNING:
            break
    assert parked.status == RequestStatus.RUNNING


def test_rows_share_one_list_of_tokens(make: Make, link: FakeLink) -> None:
    """One copy for each run of a long prompt would be pickled on the scheduling path."""
    length, runs = 65_536, 60
    bench = make(max_num_seqs=128, max_num_batched_tokens=4096, blocks=4096)
    step = length // (runs + 1)
    spans = [Span(i * step + 1, step - 1, i * step + 1, 0, 0) for i in range(runs)]
    whole = BlockRef("ab" * 32, length, 4096, 0)
    link.plan = msgspec.structs.replace(
        PLAN, tokens=length, exact=0, spans=tuple(spans), blocks=(whole,)
    )
    request = bench.add([7] * length)
    output = bench.step()
    rows = [new for new in output.scheduled_new_reqs if "/kvshare-" in new.req_id]
    assert len(rows) >= runs - 1
    for row in rows:
        assert row.prompt_token_ids is request.prompt_token_ids
        assert row.prefill_token_ids is request.prompt_token_ids
    assert len(pickle.dumps(rows)) < 2 * len(pickle.dumps(request.prompt_token_ids))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_plan_that_comes_after_the_budget_was_made_parks_its_request(
    make: Make, link: FakeLink, ahead: bool
) -> None:
    """No rows were set aside for its runs, and the runner has only `max_num_seqs`."""
    spans = tuple(Span(at, 8, at, 0, at) for at in range(2, LENGTH, 12))
    link.plan = msgspec.structs.replace(PLAN, exact=0, spans=spans)
    bench = make(ahead=ahead, max_num_seqs=4)
    for start in range(500, 800, 100):
        bench.add(range(start, start + 10), max_tokens=50, params=OFF)
    bench.step()
    link.late = 1  # not there when the budget is made, but there when vLLM asks
    request = bench.add()
    output = bench.schedule()
    assert len(output.num_scheduled_tokens) <= 4
    assert [state.request for state in bench.planning.runs.parked] == [request]
    bench.finish(output)
    bench.drain(200)
    assert said(bench, request)["edited"] == sum(span.length for span in spans[:-1]) + 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_late_plan_does_not_overdraw_the_tokens_of_its_step(
    make: Make, link: FakeLink, ahead: bool
) -> None:
    """Tokens that its request does not need go to the next one, whose placeholders come on top."""
    short = tuple(range(60))
    spans = (Span(10, 30, 10, 0, 10),)
    link.plan = msgspec.structs.replace(PLAN, tokens=60, exact=0, spans=spans)
    bench = make(ahead=ahead, max_num_batched_tokens=64)
    bench.add(range(500, 510), max_tokens=50, params=OFF)
    bench.step()
    link.late = 1
    bench.add(short), bench.add(range(1000, 1200), params=OFF)
    output = bench.schedule()
    assert output.total_num_scheduled_tokens <= 64
    assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())


class Unsteady(FakeLink):
    """Plans of any shape; any of them may come late, by any number of questions."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def answer(self, request_id: bytes, seconds: float) -> Any:
        if self.rng.random() < 0.4:
            raise DeadlineError("not yet")
        starts = sorted(self.rng.sample(range(1, LENGTH - 10), self.rng.randrange(1, 9)))
        ends = [*starts[1:], LENGTH]
        spans = tuple(
            Span(at, max(1, (end - at) // 2), at, 0, at)
            for at, end in zip(starts, ends, strict=True)
        )
        return msgspec.structs.replace(PLAN, exact=0, spans=spans)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_step_is_larger_than_the_runner(
    make: Make, monkeypatch: pytest.MonkeyPatch, ahead: bool, seed: int
) -> None:
    """Whenever plans come, the limits hold: rows in a step, requests that hold rows without being
    scheduled, and tokens."""
    rng = random.Random(seed)
    unsteady = Unsteady(rng)
    unsteady.client = SimpleNamespace(greeted=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(link_module, "open_link", lambda config: unsteady)
    bench = make(ahead=ahead, max_num_seqs=6, max_num_batched_tokens=200, blocks=64)
    placed, begun = 0, 0
    for _ in range(120):
        while len(bench.scheduler.waiting) < 3 and begun < 40:
            begun += 1
            first = rng.randrange(0, 500)
            bench.add(range(first, first + LENGTH), max_tokens=rng.choice([1, 4, 8]))
        output = bench.schedule()
        running = {request.request_id for request in bench.scheduler.running}
        assert len(running | output.num_scheduled_tokens.keys()) <= 6
        assert output.total_num_scheduled_tokens <= 200
        placed += len(runs_of(output))
        bench.finish(output)
    assert placed > 20


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path: Path) -> list[Any]:
    from vllm.lora.request import LoRARequest

    made = []
    for number in (1, 2):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights %d" % number)
        made.append(LoRARequest(f"a{number}", number, str(folder)))
    return made


@pytest.mark.parametrize("first_runs", [True, False])
def test_virtual_rows_count_against_the_adapters_of_a_step(
    make: Make, adapters: list[Any], first_runs: bool
) -> None:
    """The worker has room for one adapter; a step with rows of two would end the engine."""
    bench = make(lora=1, max_num_batched_tokens=64, max_num_seqs=8)
    bench.scheduler.max_num_scheduled_tokens = 8
    first, second = adapters
    if first_runs:
        bench.add(range(500, 505), lora=first, max_tokens=3, params=OFF)
        bench.step()
    requests = [bench.add(lora=second), bench.add(range(200, 300), lora=first), bench.add()]
    used = []
    for _ in range(200):
        output = bench.schedule()
        names = [name.split("/kvshare-")[0] for name in output.num_scheduled_tokens]
        loras = [bench.scheduler.requests[name].lora_request for name in names]
        used.append({lora.lora_int_id for lora in loras if lora is not None})
        bench.finish(output)
        if not bench.scheduler.has_unfinished_requests():
            break
    assert max(map(len, used)) == 1
    assert {1} in used
    assert {2} in used
    assert all(request.is_finished() for request in requests)


@pytest.mark.parametrize("again", ["in place", "under another id", "not at all"])
def test_blocks_of_an_adapters_old_files_are_not_found_for_its_new_ones(
    make: Make, link: FakeLink, adapters: list[Any], again: str
) -> None:
    """vLLM knows an adapter by name and path: it would compute requests of the new files behind
    rows of the old ones, and these would be stored under the name of the new ones."""
    link.plan = None
    bench = make(lora=2)
    old = adapters[0]
    bench.add(lora=old)
    bench.drain()
    weights = Path(old.lora_path) / "adapter_model.safetensors"
    trained = weights.read_bytes()
    weights.write_bytes(b"trained further")
    new = {
        "in place": msgspec.structs.replace(old, load_inplace=True),
        "under another id": msgspec.structs.replace(old, lora_int_id=7),
        "not at all": old,
    }[again]
    found = []
    for lora in (new, new):
        request = bench.add(lora=lora)
        bench.drain()
        found.append(said(bench, request)["prefix_cached"])
    assert found == [0, 96]
    weights.write_bytes(trained)
    request = bench.add(lora=msgspec.structs.replace(old, load_inplace=True))
    bench.drain()
    assert said(bench, request)["prefix_cached"] == 96


# --- pause and reset ------------------------------------------------------------------------------


def parked(bench: Bench) -> Any:
    """A request that waits for its placeholders, with some of them placed."""
    request = bench.add()
    bench.scheduler.max_num_scheduled_tokens = 4
    bench.step()
    assert [state.request for state in bench.planning.runs.parked] == [request]
    return request


def test_nothing_is_placed_while_everything_is_paused(make: Make) -> None:
    bench = make()
    request = parked(bench)
    bench.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(3):
        output = bench.step()
        assert output.total_num_scheduled_tokens == 0
        assert not runs_of(output)
    bench.scheduler.set_pause_state(PauseState.UNPAUSED)
    bench.drain()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_new_requests_are_not_looked_up_ahead_while_none_is_admitted(
    make: Make, link: FakeLink
) -> None:
    bench = make()
    request = parked(bench)
    bench.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    asked = len(link.asked)
    for start in range(20):
        bench.add(range(start, start + LENGTH))
    arrived = len(link.asked)
    for _ in range(8):
        bench.step()
    assert len(link.asked) == arrived <= asked + 8
    assert request.is_finished()  # what holds rows goes on
    bench.scheduler.set_pause_state(PauseState.UNPAUSED)
    bench.scheduler.max_num_scheduled_tokens = 512
    bench.drain()


def at(bench: Bench, moment: str) -> Any:
    """A request at one point of its loading, with the step in flight if there is one."""
    request = parked(bench)
    if moment == "runs left":
        return request, None
    bench.scheduler.max_num_scheduled_tokens = 64
    output = bench.schedule()  # places its last placeholders
    assert not bench.planning.runs.parked
    if moment == "last step in flight":
        return request, output
    bench.finish(output)
    assert request.request_id in bench.scheduler.finished_recving_kv_req_ids
    if moment == "admitted, no room":
        bench.scheduler.max_num_active_reqs = 0
        bench.step()
        bench.scheduler.max_num_active_reqs = 8
    return request, None


@pytest.mark.parametrize("moment", ["runs left", "last step in flight", "loaded"])
@pytest.mark.parametrize("connector_too", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_reset_releases_requests_that_wait_with_rows(
    make: Make, link: FakeLink, moment: str, connector_too: bool, ahead: bool
) -> None:
    """They give their blocks back and start again, where vLLM's own reset would raise."""
    bench = make(ahead=ahead)
    free = bench.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request, in_flight = at(bench, moment)
    asked = len(link.asked)
    assert bench.scheduler.reset_prefix_cache(True, connector_too)
    assert request.status == RequestStatus.WAITING
    assert not bench.planning.runs.parked
    if in_flight is not None:
        bench.finish(in_flight)  # the report of a load that no longer matters
    bench.drain()
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert len(link.asked) == asked + 1
    assert link.asked[-1][0] == link.asked[0][0] or connector_too
    assert bench.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize("ended", [False, True])
def test_a_reset_succeeds_while_a_step_is_in_flight(make: Make, ended: bool) -> None:
    """As in an engine without a connector."""
    bench = make(ahead=True)
    request = bench.add(max_tokens=30)
    bench.step()
    in_flight = bench.schedule()
    if ended:
        bench.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert bench.scheduler.reset_prefix_cache(not ended)
    bench.finish(in_flight)
    bench.drain()
    assert request.is_finished()
    pool = bench.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_the_release_of_an_aborted_requests_report_is_harmless(make: Make) -> None:
    bench = make()
    request, in_flight = at(bench, "last step in flight")
    assert bench.scheduler.reset_prefix_cache(True)
    bench.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    bench.finish(in_flight)
    assert not bench.scheduler.requests


def test_a_reset_changes_the_namespace_for_good(make: Make, link: FakeLink) -> None:
    """After a weight update, earlier rows are never asked for, nor stored under the new weights."""
    bench = make()
    waiting = bench.add(max_tokens=1)
    digest = link.asked[0][0]
    assert bench.scheduler.reset_prefix_cache(False, True)
    dropped = protocol.Finish("lease", Outcome(failed="reset", recomputed=LENGTH))
    assert dropped in link.told
    output = bench.step()
    (save,) = output.kv_connector_metadata.saves
    assert save.namespace.digest == link.asked[-1][0] != digest
    bench.drain()
    assert waiting.is_finished()
    assert bench.scheduler.reset_prefix_cache(False, True)
    bench.add()
    assert len({asked for asked, _ in link.asked}) == 3


def test_a_running_request_is_not_stored_after_a_reset(make: Make, link: FakeLink) -> None:
    link.plan = None
    bench = make(max_num_batched_tokens=64)
    bench.add(max_tokens=2)
    output = bench.step()
    assert not output.kv_connector_metadata.saves
    assert not bench.scheduler.reset_prefix_cache(False, True)  # its blocks are in use
    assert not any(bench.step().kv_connector_metadata.saves for _ in range(2))


def test_a_reset_with_vllms_scheduler_fails_while_rows_are_being_loaded(
    make: Make, link: FakeLink
) -> None:
    bench = make(stock=True)
    bench.add()
    output = bench.schedule()
    assert output.kv_connector_metadata.loads
    assert bench.scheduler.reset_connector_cache() is False
    bench.finish(output)
    bench.drain()
    assert bench.scheduler.reset_connector_cache() is True


# --- block frees ----------------------------------------------------------------------------------


def test_blocks_of_a_parked_request_are_free_when_its_last_step_has_ended(make: Make) -> None:
    """Not one step later: the next step may be long in coming."""
    bench = make(ahead=True, max_num_batched_tokens=64)
    pool = bench.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    bench.add(range(500, 510), max_tokens=100, params=OFF)
    bench.step()
    taken = free - pool.get_num_free_blocks()
    bench.scheduler.max_num_scheduled_tokens = 5
    request = bench.add()
    output = bench.schedule()
    assert runs_of(output)
    assert request.last_sched_seq == bench.scheduler.sched_step_seq
    bench.finish(output)
    bench.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    bench.step()
    assert not bench.scheduler.deferred_frees
    assert pool.get_num_free_blocks() == free - taken


# --- accounting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [512, 4], ids=["same step", "parked"])
def test_placeholders_are_no_cache_hits(make: Make, budget: int) -> None:
    """Seventy of a hundred tokens are reused; placeholders and tail are computed."""
    bench = make()
    bench.scheduler.max_num_scheduled_tokens = budget
    request = bench.add(max_tokens=1)
    bench.step()
    hits = bench.stats.connector_prefix_cache_stats
    assert (hits.queries, hits.hits) == (LENGTH, 70)
    assert sum(hits.hits_by_source.values()) == 70
    bench.drain()
    prefill = bench.answers[request.request_id].prefill_stats
    assert prefill.num_external_cached_tokens == prefill.num_cached_tokens == 70
    assert prefill.num_computed_tokens == 30


# --- lookups --------------------------------------------------------------------------------------


def test_a_lookup_starts_when_its_request_arrives(make: Make, link: FakeLink) -> None:
    bench = make()
    bench.add()
    assert len(link.asked) == 1
    bench.drain()
    assert len(link.asked) == 1


def test_requests_far_back_in_the_queue_hold_no_plans(make: Make, link: FakeLink) -> None:
    """Every plan keeps blocks in memory."""
    bench = make()
    for start in range(30):
        bench.add(range(start, start + LENGTH))
    assert len(link.asked) == 8


def test_a_request_that_queued_past_the_deadline_of_its_early_lookup_asks_again(
    make: Make, link: FakeLink
) -> None:
    """The daemon dropped the early lookup since no request waited for it; now one does."""
    bench = make()
    request = bench.add()
    bench.planning.state_of(request).asked_at -= 60.0
    link.late = 1
    bench.step()
    assert len(link.asked) == 2
    unused = Outcome(failed="aborted", recomputed=LENGTH)
    assert protocol.Finish("lease", unused) in link.told
    bench.drain()
    assert said(bench, request)["reused"] == 70


def test_vllm_may_ask_as_often_as_it_likes(make: Make, link: FakeLink) -> None:
    """Nothing happens until vLLM takes a promise: no plan is given up, no hash is private."""
    bench = make()
    request = bench.add()
    hashes, told = list(request.block_hashes), list(link.told)
    connector = bench.scheduler.connector
    for local in (0, 96, 32, 0):
        connector.get_num_new_matched_tokens(request, local)
    assert request.block_hashes == hashes
    assert link.told == told
    bench.step()
    assert request.block_hashes[0] == hashes[0]
    assert request.block_hashes[1:] != hashes[1:]


def test_hashes_are_public_again_when_there_is_no_room(make: Make) -> None:
    bench = make(blocks=4)
    request = bench.add()
    hashes = list(request.block_hashes)
    taken = bench.scheduler.kv_cache_manager.block_pool.get_new_blocks(2)
    bench.step()
    assert request.status == RequestStatus.WAITING
    assert request.block_hashes == hashes
    bench.scheduler.kv_cache_manager.block_pool.free_blocks(taken)


def test_hashes_are_public_again_when_the_rows_are_gone(make: Make) -> None:
    """After a failed load, a preemption or a reset, a request computes its own rows."""
    for lose in ("load", "preemption", "reset"):
        bench = make()
        request = bench.add(max_tokens=30)
        hashes = list(request.block_hashes)
        output = bench.schedule()
        assert request.block_hashes[1:] != hashes[1:]
        bench.finish(output, set(bench.planning.orders.loading[-1]) if lose == "load" else None)
        if lose == "preemption":
            bench.scheduler.running.remove(request)
            bench.scheduler._preempt_request(request, 0.0)
        if lose == "reset":
            assert bench.scheduler.reset_prefix_cache(True)
        assert request.block_hashes[: len(hashes)] == hashes
        bench.drain()
        assert len(request.block_hashes) == (LENGTH + 30) // BLOCK


def test_the_same_rows_have_the_same_private_hashes_and_no_others_do(
    make: Make, link: FakeLink
) -> None:
    """This includes blocks that are filled later, one at a time. Another donor gives other hashes;
    a stricter request with the same rows gets the same ones."""
    bench = make(max_num_seqs=64)
    twins = [bench.add(max_tokens=40) for _ in range(2)]
    stricter = bench.add(max_tokens=40, params={"kvshare.policy": "faithful"})
    bench.drain()
    link.plan = msgspec.structs.replace(PLAN, blocks=(BlockRef("cd" * 32, 128, 4096, 0),))
    bench.scheduler.reset_prefix_cache()
    other_donor = bench.add(max_tokens=40)
    bench.drain()
    first, second, third = (tuple(same.block_hashes) for same in (*twins, stricter))
    assert first == second == third
    assert other_donor.block_hashes[0] == first[0]
    assert not set(other_donor.block_hashes[1:]) & set(first)


# --- beside other connectors ----------------------------------------------------------------------


def test_the_outer_failure_policy_counts(make: Make, tmp_path: Path) -> None:
    """MultiConnector's own setting is vLLM's default, whatever KVShare's says."""
    with pytest.raises(ConfigError, match=r'outer .*"kv_load_failure_policy": "recompute"'):
        make(beside(tmp_path, failures="fail"))


def example(tmp_path: Path) -> dict[str, Any]:
    module = "vllm.distributed.kv_transfer.kv_connector.v1.example_connector"
    return sibling("ExampleConnector", module, shared_storage_path=str(tmp_path / "shared"))


def test_beside_a_connector_that_knows_tokens_only_exact_rows_are_asked_for(
    make: Make, link: FakeLink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvshare"):
        bench = make(beside(tmp_path, example(tmp_path)))
        for start in (0, 1):
            bench.add(range(start, start + LENGTH))
    assert [policy for _, policy in link.asked] == ["exact", "exact"]
    (line,) = [r.getMessage() for r in caplog.records if r.name == "kvshare"]
    assert "beside ExampleConnector only exact rows are reused" in line
    link.plan = msgspec.structs.replace(PLAN, spans=PLAN.spans[:1], generation=0)
    bench.drain()


def test_with_vllms_own_scheduler_only_exact_rows_are_asked_for(make: Make, link: FakeLink) -> None:
    bench = make(stock=True)
    bench.add()
    assert [policy for _, policy in link.asked] == ["exact"]


def test_a_sibling_whose_loads_always_fail_does_not_stop_its_requests(
    make: Make, link: FakeLink, tmp_path: Path
) -> None:
    """vLLM continues from the first block that failed. The sibling would promise a preempted
    request the same block again, for ever."""
    link.plan = None
    bench = make(beside(tmp_path, sibling("Failing", "tests.engine.siblings")))
    request = bench.add()
    for _ in range(12):
        output = bench.schedule()
        name = request.request_id
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        begins = name in resumed or any(new.req_id == name for new in output.scheduled_new_reqs)
        (blocks,) = bench.scheduler.kv_cache_manager.get_block_ids(name)
        bench.finish(output, {blocks[0]} if begins else None)
        if request.is_finished():
            break
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert request.num_preemptions == 0


def test_a_failed_load_of_kvshares_own_begins_again_once(make: Make, link: FakeLink) -> None:
    bench = make()
    request = bench.add()
    output = bench.schedule()
    (blocks,) = bench.scheduler.kv_cache_manager.get_block_ids(request.request_id)
    bench.finish(output, set(blocks[:1]))
    assert request.num_preemptions == 1
    bench.drain()
    answer = bench.answers[request.request_id].kv_transfer_params
    assert (answer["kvshare.reused"], answer["kvshare.reason"]) == (0, "load_failed")


@pytest.mark.parametrize("edited", [False, True], ids=["exact", "edited"])
@pytest.mark.parametrize("budget", [512, 4], ids=["same step", "parked"])
def test_a_request_whose_load_failed_begins_again_with_exact_rows(
    make: Make, link: FakeLink, edited: bool, budget: int
) -> None:
    """Two of its blocks are in vLLM's own cache. If the second has edited rows it is not used: its
    prompt is saved as one that was computed in full. The answer says what was used."""
    begin = [Span(0, 40, 0, 0, 0, True), Span(50, 14, 52, 0, 52)]
    if not edited:
        begin = [Span(0, 65, 0, 0, 0, True)]
    link.plan = msgspec.structs.replace(PLAN, spans=(*begin, Span(70, 20, 72, 0, 72)))
    bench = make()
    first = bench.add()
    bench.step()
    manager = bench.scheduler.kv_cache_manager
    (blocks,) = manager.get_block_ids(first.request_id)
    bench.drain()
    manager.block_pool.evict_blocks(set(blocks[2:]))
    bench.scheduler.max_num_scheduled_tokens = budget
    request = bench.add()
    output = bench.schedule()
    assert bool(bench.planning.runs.parked) == (budget == 4)
    state = bench.planning.find(request)
    assert state is not None
    assert state.local == 2 * BLOCK
    (blocks,) = manager.get_block_ids(request.request_id)
    bench.finish(output, set(blocks[2:]))
    bench.scheduler.max_num_scheduled_tokens = 512
    link.told.clear()
    steps = [bench.step() for _ in range(5)]
    assert request.is_finished()
    (save,) = [spec for step in steps for spec in step.kv_connector_metadata.saves]
    assert save.reuse.generation == 0
    cached = BLOCK if edited else 2 * BLOCK
    scheduled = [step.num_scheduled_tokens.get(request.request_id, 0) for step in steps]
    assert sum(scheduled) == LENGTH - cached + 1, "and one of the answer"
    assert protocol.EngineCached(cached, request.request_id) in link.told
    said = bench.answers[request.request_id].kv_transfer_params
    assert (said["kvshare.prefix_cached"], said["kvshare.recomputed"]) == (cached, LENGTH - cached)
    assert (said["kvshare.reason"], said["kvshare.generation"]) == ("load_failed", 0)


def twice(tmp_path: Path) -> dict[str, Any]:
    return beside(tmp_path, kvshare_alone(tmp_path / "first"))


@pytest.mark.parametrize("stock", [False, True])
def test_kvshare_beside_itself_is_refused(make: Make, tmp_path: Path, stock: bool) -> None:
    """Each would store as exact what the other has edited, and both would answer lookups."""
    with pytest.raises(ConfigError, match="names KVShareConnector more than once"):
        make(twice(tmp_path), stock=stock)
    bench = make(beside(tmp_path), stock=stock)  # once is fine, also after a refusal
    bench.add()
    bench.drain()


def test_kvshare_beside_itself_is_refused_where_the_model_is_not_served(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle connectors also answer vLLM: its scheduler would raise when a request ends."""
    monkeypatch.setattr(connector_module, "decline_reason", lambda config: "sliding_window")
    with pytest.raises(ConfigError, match="names KVShareConnector more than once"):
        make(twice(tmp_path), stock=True)


def test_two_engines_of_a_process_have_a_connector_each(make: Make) -> None:
    first, second = make(), make()
    for bench in (first, second):
        request = bench.add()
        bench.drain()
        assert said(bench, request)["reused"] == 70


# --- what the answer says -------------------------------------------------------------------------


def said(bench: Bench, request: Any) -> dict[str, Any]:
    """The answer's fields without their prefix."""
    answer = bench.answers[request.request_id].kv_transfer_params
    return {name.removeprefix("kvshare."): value for name, value in answer.items()}


def counted(link: FakeLink) -> list[Any]:
    """What the daemon was told, without times."""
    return [message for message in link.told if not isinstance(message, protocol.Prefilled)]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What KVShare has logged."""
    with caplog.at_level(logging.INFO, "kvshare"):
        yield lambda: [r.getMessage() for r in caplog.records if r.name == "kvshare"]


def test_an_answer_says_what_was_reused(make: Make, link: FakeLink) -> None:
    bench = make()
    request = bench.add()
    bench.drain()
    assert said(bench, request) == {
        "reused": 70, "exact": 40, "continued": 0, "edited": 30, "recomputed": 30,
        "prefix_cached": 0, "generation": PLAN.generation,
        "donor": "d", "reason": "", "policy": "balanced",
    }  # fmt: skip
    link.plan = msgspec.structs.replace(PLAN, spans=(), lease="", donors=(), declined="no_donor")
    request = bench.add(range(300, 300 + LENGTH))
    bench.drain()
    found = said(bench, request)
    assert (found["reused"], found["recomputed"], found["reason"]) == (0, LENGTH, "no_donor")


@pytest.mark.parametrize("by", ["preemption", "reset"])
def test_an_answer_of_a_preempted_request_counts_what_was_computed_anew(
    make: Make, link: FakeLink, by: str
) -> None:
    """It computes the prompt itself, since nothing of what it had loaded is left."""
    bench = make()
    request = bench.add(max_tokens=30)
    bench.step()
    if by == "reset":
        assert bench.scheduler.reset_prefix_cache(True, True)
    else:
        bench.scheduler.running.remove(request)
        bench.scheduler._preempt_request(request, 0.0)
        bench.scheduler.reset_prefix_cache()
    told = counted(link)
    saves = []
    while bench.scheduler.has_unfinished_requests():
        saves += bench.step().kv_connector_metadata.saves
    assert said(bench, request) == {
        "reused": 0, "exact": 0, "continued": 0, "edited": 0, "recomputed": LENGTH,
        "prefix_cached": 0, "generation": 0,
        "donor": "", "reason": "preempted", "policy": "balanced",
    }  # fmt: skip
    assert not saves
    assert counted(link) == told  # its lookup was counted when its rows were loaded


def test_what_vllms_cache_kept_of_a_preempted_request_is_no_reuse(
    make: Make, link: FakeLink
) -> None:
    bench = make()
    request = bench.add(max_tokens=30)
    bench.step()
    bench.scheduler.running.remove(request)
    bench.scheduler._preempt_request(request, 0.0)
    told = counted(link)
    bench.drain()
    found = said(bench, request)
    assert (found["reused"], found["prefix_cached"], found["recomputed"]) == (0, 32, LENGTH - 32)
    assert counted(link) == told


def test_what_a_preempted_request_has_computed_itself_is_no_prefix_hit(
    make: Make, link: FakeLink
) -> None:
    link.plan = None
    bench = make()
    request = bench.add(max_tokens=30)
    bench.step()
    for _ in range(2):
        bench.scheduler.running.remove(request)
        bench.scheduler._preempt_request(request, 0.0)
        bench.step()
    bench.drain()
    found = said(bench, request)
    assert (found["prefix_cached"], found["recomputed"]) == (0, LENGTH)
    assert not any(isinstance(message, protocol.EngineCached) for message in link.told)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"kvshare.polcy": "exact"}, {"reason": "unknown_parameter", "unknown": ["kvshare.polcy"]}),
        ({"kvshare.policy": "wild"}, {"reason": "unknown_policy", "asked": "wild"}),
        ({"kvshare.policy": "off"}, {"reason": "policy_off"}),
    ],
)
def test_what_means_nothing_is_computed_in_full_and_said(
    make: Make,
    link: FakeLink,
    quiet: Callable[[], list[str]],
    params: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    bench = make()
    requests = [bench.add(params=params) for _ in range(2)]
    bench.drain()
    assert not link.asked
    for request in requests:
        found = said(bench, request)
        assert {name: found[name] for name in expected} == expected
        assert found["reused"] == 0
    asked_in_vain = "unknown" in expected or "asked" in expected
    assert len(quiet()) == asked_in_vain  # once, not once per request


def test_a_laxer_policy_is_not_granted_and_the_answer_says_so(
    make: Make, link: FakeLink, quiet: Callable[[], list[str]]
) -> None:
    bench = make()
    lax, strict = (
        bench.add(params={"kvshare.policy": name}) for name in ("aggressive", "faithful")
    )
    bench.drain()
    assert [policy for _, policy in link.asked] == ["balanced", "faithful"]
    found = said(bench, lax)
    assert (found["policy"], found["asked"]) == ("balanced", "aggressive")
    found = said(bench, strict)
    assert found["policy"] == "faithful"
    assert "asked" not in found
    (line,) = quiet()
    assert "policy 'aggressive' was asked for, 'balanced' is granted" in line


def test_an_answer_names_the_policy_that_the_daemon_grants(
    make: Make, link: FakeLink, tmp_path: Path
) -> None:
    """Another engine with a stricter policy has started the daemon."""
    link.policy = "faithful"
    bench = make(kvshare_alone(tmp_path / "home", policy="aggressive"))
    found = [bench.add(params=params) for params in (None, {"kvshare.policy": "balanced"})]
    bench.drain()
    plain, asking = (said(bench, request) for request in found)
    assert (plain["policy"], asking["policy"]) == ("faithful", "faithful")
    assert ("asked" in plain, asking["asked"]) == (False, "balanced")


def test_an_answer_may_be_sent_back(make: Make, link: FakeLink) -> None:
    """Proxies pass the whole field on: nothing in it has an effect, and nothing in it is an
    error."""
    bench = make()
    first = bench.add(params={"kvshare.policy": "wild", "kvshare.polcy": 1})
    bench.drain()
    answer = bench.answers[first.request_id].kv_transfer_params
    second = bench.add(params={**answer, "kvshare.policy": "exact", "do_remote_decode": False})
    bench.drain()
    assert said(bench, second)["policy"] == "exact"
    assert "unknown" not in said(bench, second)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_line_for_each_request_if_wanted(
    make: Make, tmp_path: Path, quiet: Callable[[], list[str]], wanted: bool
) -> None:
    bench = make(kvshare_alone(tmp_path / "home", log_requests=wanted))
    request = bench.add()
    bench.drain()
    lines = [line for line in quiet() if request.request_id in line]
    assert len(lines) == wanted
    assert all("reused=70 exact=40 continued=0 edited=30 recomputed=30" in line for line in lines)


# --- answers --------------------------------------------------------------------------------------


def answers_of(output: Any) -> list[SaveSpec]:
    """The answers that a step stores."""
    return list(output.kv_connector_metadata.answers)


def test_an_answer_is_ordered_in_the_step_after_the_end(make: Make, link: FakeLink) -> None:
    link.plan = None
    bench = make()
    request = bench.add(max_tokens=5)
    blocks: list[int] = []
    while not request.is_finished():
        output = bench.step()
        assert answers_of(output) == []
        if not blocks:
            (blocks,) = bench.scheduler.kv_cache_manager.get_block_ids(request.request_id)
    (spec,) = answers_of(bench.schedule())
    assert np.frombuffer(spec.tokens, np.int32).tolist() == [*range(LENGTH), 7, 7, 7, 7]
    assert (spec.extends, spec.fresh, spec.block_ids) == (LENGTH, [Run(LENGTH, LENGTH + 4)], blocks)
    assert spec.reuse == Reuse()
    assert answers_of(bench.schedule()) == []


def test_the_answer_to_an_edited_prompt_says_which_rows_it_has(make: Make, link: FakeLink) -> None:
    bench = make()
    twins = [bench.add(max_tokens=5) for _ in range(2)]
    saves: list[SaveSpec] = []
    while not all(request.is_finished() for request in twins):
        saves += bench.step().kv_connector_metadata.saves
    answers = answers_of(bench.schedule())
    contexts = {contexts_of_rows(spec.reuse, LENGTH) for spec in saves}
    assert len(contexts) == 1
    assert [spec.reuse.generation for spec in answers] == [1, 1]
    assert {spec.reuse.contexts for spec in answers} == contexts != {()}
    assert {spec.reuse.spans for spec in answers} == {()}


@pytest.mark.parametrize(
    "end", ["preempted", "reset", "error", "before its first token", "a row is missing"]
)
def test_what_is_unsure_is_no_answer(make: Make, link: FakeLink, end: str) -> None:
    link.plan = None
    bench = make()
    request = bench.add(max_tokens=30)
    bench.step()
    scheduler, status = bench.scheduler, RequestStatus.FINISHED_ABORTED
    if end != "before its first token":
        bench.step()
        bench.step()
    if end == "preempted":
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        bench.step()
        bench.step()
    if end == "reset":
        assert scheduler.reset_connector_cache()
    if end == "error":
        status = RequestStatus.FINISHED_ERROR
    if end == "a row is missing":
        request.num_computed_tokens -= 1
    scheduler.finish_requests([request.request_id], status)
    assert answers_of(bench.schedule()) == []


def test_a_step_in_flight_does_not_count_for_an_answer(make: Make, link: FakeLink) -> None:
    """It computes the row of the last token, which is left out."""
    link.plan = None
    bench = make(ahead=True)
    request = bench.add(max_tokens=30)
    first = bench.schedule()
    for _ in range(3):
        flying = bench.schedule()
        bench.finish(first)
        first = flying
    assert request.num_in_flight_tokens == 1
    assert request.num_output_tokens == 3
    bench.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
    (spec,) = answers_of(bench.schedule())
    assert spec.fresh == [Run(LENGTH, LENGTH + 2)]
    bench.finish(first)
