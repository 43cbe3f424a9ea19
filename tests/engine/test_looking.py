"""Second looks one step after the other, on vLLM's real scheduler objects."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvshare_connectors.vllm.looks as looks_module
import numpy as np
import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from kvshare_store.daemon import protocol
from kvshare_store.save.second_looks import Look
from tests.engine.schedulers import BLOCK, NAMESPACE, PLAN, Bench, FakeLink, kvshare_alone
from tests.engine.test_steps import link, make

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

__all__ = ["link", "make"]

Make = Callable[..., Bench]
CHUNK = 48
PROMPT = range(500, 700)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks_module, "_PAUSES_S", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def idle(make: Make, tmp_path: Path, link: FakeLink) -> Callable[..., Bench]:
    """An engine that has served a request, so that it makes second looks now."""
    link.plan = None

    def made(**options: Any) -> Bench:
        settings = {"second_look": "idle", "second_look_tokens": CHUNK}
        settings |= options.pop("kvshare", {})
        bench = make(kvshare_alone(tmp_path / "home", **settings), **options)
        bench.add()
        bench.drain()
        bench.answers.clear()
        return bench

    return made


def give(bench: Bench, link: FakeLink, prompt: Sequence[int] = PROMPT, space: str = "") -> Look:
    tokens = np.asarray(prompt, np.int32).tobytes()
    look = Look("node", 7, space or bench.planning.namespace.digest, tokens)
    link.looks.append(look)
    return look


def ends(link: FakeLink) -> list[str]:
    return [told.end for told in link.told if isinstance(told, protocol.Looked)]


def questions(link: FakeLink) -> int:
    return sum(isinstance(told, protocol.NextLook) for told in link.told)


def begun(bench: Bench, link: FakeLink) -> Any:
    """A look of which the first step has been computed."""
    give(bench, link)
    while not bench.step().total_num_scheduled_tokens:
        pass
    (look,) = bench.scheduler.requests.values()
    assert look.status == RequestStatus.RUNNING
    return look


def run_out(bench: Bench) -> list[int]:
    """Step until the engine sleeps; tokens of each step."""
    tokens = []
    while bench.scheduler.has_requests():
        tokens.append(bench.step().total_num_scheduled_tokens)
        assert len(tokens) < 100
    return tokens


def check_gone(bench: Bench) -> None:
    """No request, no paged block is left; the next step tells the runner of the end."""
    assert not bench.scheduler.requests
    assert not bench.planning.states
    assert bench.scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_an_idle_engine_computes_a_prompt_in_steps_of_bounded_size(
    idle: Callable[..., Bench], link: FakeLink, ahead: bool
) -> None:
    bench = idle(ahead=ahead)
    give(bench, link)
    steps = run_out(bench)
    assert sum(steps) == len(PROMPT)
    assert max(steps) == CHUNK
    assert ends(link) == ["computed"]
    assert link.asked[-1][1] == "exact"
    assert not bench.answers, "frontends hear nothing of it"
    check_gone(bench)


def test_no_step_is_scheduled_while_one_is_in_flight(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    bench = idle(ahead=True)
    begun(bench, link)
    first = bench.schedule()
    second = bench.schedule()
    assert first.total_num_scheduled_tokens == CHUNK
    assert second.total_num_scheduled_tokens == 0
    bench.finish(first)
    bench.finish(second)
    assert bench.step().total_num_scheduled_tokens == CHUNK


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_arrives_ends_it_and_is_scheduled_next(
    idle: Callable[..., Bench], link: FakeLink, ahead: bool
) -> None:
    bench = idle(ahead=ahead)
    look = begun(bench, link)
    request = bench.add(range(100))
    assert look.is_finished()
    output = bench.step()
    assert list(output.num_scheduled_tokens) == [request.request_id]
    assert look.request_id in output.finished_req_ids
    bench.drain()
    assert list(bench.answers) == [request.request_id]
    assert ends(link) == ["dropped"]
    run_out(bench)
    check_gone(bench)


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
def test_a_pause_ends_it(idle: Callable[..., Bench], link: FakeLink, state: PauseState) -> None:
    bench = idle()
    begun(bench, link)
    bench.scheduler.set_pause_state(state)
    check_gone(bench)
    assert ends(link) == ["dropped"]
    give(bench, link)
    bench.step()
    assert not bench.scheduler.has_requests()
    bench.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert bench.scheduler.has_requests()
    assert sum(run_out(bench)) > 0


def test_all_requests_aborted_ends_it_until_the_next_request(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    """So a shutdown ends too: vLLM aborts all, and goes when nothing is left."""
    bench = idle()
    begun(bench, link)
    assert bench.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED) == []
    give(bench, link)
    bench.step()
    assert not bench.scheduler.has_requests()
    check_gone(bench)
    bench.add()
    bench.drain()
    assert sum(run_out(bench)) == len(PROMPT) - BLOCK, "it goes on behind what vLLM still has"


@pytest.mark.parametrize("connector_too", [False, True])
def test_a_reset_ends_it(idle: Callable[..., Bench], link: FakeLink, connector_too: bool) -> None:
    bench = idle()
    begun(bench, link)
    assert bench.scheduler.reset_prefix_cache(reset_connector=connector_too)
    check_gone(bench)
    give(bench, link, space=NAMESPACE.digest if connector_too else "")
    asked = questions(link)
    run_out(bench)
    assert (questions(link) > asked) is not connector_too, "it has other weights now"


def test_without_blocks_it_ends(idle: Callable[..., Bench], link: FakeLink) -> None:
    bench = idle(blocks=12)
    pool = bench.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 3)
    give(bench, link)
    run_out(bench)
    assert ends(link) == ["dropped"]
    pool.free_blocks(taken)
    check_gone(bench)


def test_vllm_counts_it_nowhere(idle: Callable[..., Bench], link: FakeLink) -> None:
    bench = idle()
    bench.scheduler.finished_req_ids_dict = defaultdict(set)
    scheduler = bench.scheduler
    scheduler.make_stats()
    look = begun(bench, link)
    assert scheduler.get_request_counts() == (0, 0)
    assert not scheduler.has_unfinished_requests()
    while not look.is_finished():
        bench.step()
        stats = bench.stats
        assert (stats.num_running_reqs, stats.num_waiting_reqs) == (0, 0)
        assert stats.prefix_cache_stats.queries == 0
        assert stats.connector_prefix_cache_stats.queries == 0
    assert ends(link) == ["computed"]
    assert not scheduler.finished_req_ids_dict


def test_neither_the_daemon_nor_kvshares_metrics_take_it_for_a_request(
    idle: Callable[..., Bench], link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = idle()
    link.plan = None
    waited: list[float] = []
    monkeypatch.setattr(bench.planning.tally, "looked_up", waited.append)
    look = begun(bench, link)
    assert bench.planning.states[look.request_id].look
    request = bench.add(range(100))
    assert not bench.planning.states[request.request_id].look
    give(bench, link)
    bench.drain()
    run_out(bench)
    assert ends(link) == ["dropped", "computed"]
    assert (len(link.asked), link.asked_for_looks, len(waited)) == (4, 2, 1)
    cached = [told.tokens for told in link.told if isinstance(told, protocol.EngineCached)]
    assert cached == [96], "the request's, not those of the look that goes on"


def test_off_does_nothing(idle: Callable[..., Bench], link: FakeLink) -> None:
    bench = idle(kvshare={"second_look": "off"})
    give(bench, link)
    bench.step()
    assert not bench.scheduler.has_requests()
    assert not questions(link)


def test_the_engine_sleeps_when_there_is_nothing_to_look_at(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    bench = idle()
    run_out(bench)
    assert questions(link) == 1
    bench.step()
    assert questions(link) == 1


def test_it_asks_again_where_edited_rows_were_served(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    bench = idle()
    run_out(bench)
    link.plan = PLAN
    bench.add(range(200, 300))
    bench.drain()
    before = questions(link)
    run_out(bench)
    assert questions(link) - before == len(looks_module._PAUSES_S)


def test_a_request_right_behind_another_meets_no_look(
    idle: Callable[..., Bench], link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks_module, "_PAUSES_S", (30.0,))
    bench = idle()
    give(bench, link)
    now, slept = time.monotonic(), list[float]()
    clock = SimpleNamespace(monotonic=lambda: now, sleep=slept.append)
    monkeypatch.setattr(looks_module, "time", clock)
    for _ in range(5):
        assert bench.step().total_num_scheduled_tokens == 0
    assert slept == [looks_module._TICK_S] * 5, "each waits milliseconds"
    assert bench.scheduler.has_requests()
    assert not questions(link)


def test_a_prompt_of_another_namespace_is_given_back(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    bench = idle()
    give(bench, link, space="ab" * 32)
    assert sum(run_out(bench)) == 0
    assert ends(link) == ["dropped"]


def test_a_prompt_that_is_too_long_is_declined(idle: Callable[..., Bench], link: FakeLink) -> None:
    bench = idle()
    bench.scheduler.max_model_len = len(PROMPT)
    give(bench, link)
    assert sum(run_out(bench)) == 0
    assert ends(link) == ["declined"]


@pytest.mark.parametrize("token", [-1, 1000, (1 << 31) - 1])
def test_a_prompt_with_tokens_that_the_model_lacks_is_declined(
    idle: Callable[..., Bench], link: FakeLink, token: int
) -> None:
    """vLLM's frontend refuses them; in the engine they would end it for everybody."""
    bench = idle()
    give(bench, link, [*PROMPT, token])
    assert sum(run_out(bench)) == 0
    assert ends(link) == ["declined"]


def test_requests_with_adapters_are_looked_at_by_nobody(
    make: Make, tmp_path: Path, link: FakeLink
) -> None:
    from vllm.lora.request import LoRARequest

    link.plan = None
    bench = make(kvshare_alone(tmp_path / "home", second_look="idle"), lora=2)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    bench.add(lora=LoRARequest("one", 1, str(tmp_path / "adapter")))
    bench.drain()
    run_out(bench)
    assert not questions(link)


# --- beside requests that run ---------------------------------------------------------------------


SHARE = {"second_look": 0.0625}
"""Of the 512 tokens of a step: 32."""


def test_a_request_whose_last_token_is_on_its_way_leaves_no_tokens_to_a_look(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    """Nothing more is scheduled of it, so the step must not be larger for it."""
    bench = idle(kvshare=SHARE, ahead=True)
    request = bench.add(range(100), max_tokens=9)
    bench.step()
    give(bench, link)
    in_flight, parts = [], []
    while not request.is_finished():
        in_flight.append(bench.schedule())
        scheduled = in_flight[-1].num_scheduled_tokens
        parts += [tokens for name, tokens in scheduled.items() if name != request.request_id]
        if len(in_flight) > 1:
            bench.finish(in_flight.pop(0))
    assert len(parts) > 3
    assert max(parts) == 32


@pytest.mark.parametrize("ahead", [False, True])
def test_a_share_of_each_step_goes_to_looks_while_nobody_waits(
    idle: Callable[..., Bench], link: FakeLink, ahead: bool
) -> None:
    bench = idle(kvshare=SHARE, ahead=ahead)
    request = bench.add(range(100), max_tokens=60)
    bench.step()
    give(bench, link)
    parts = []
    while not request.is_finished():
        output = bench.step()
        scheduled = dict(output.num_scheduled_tokens)
        scheduled.pop(request.request_id, None)
        parts += scheduled.values()
        assert len(scheduled) <= 1
    run_out(bench)
    assert sum(parts) == len(PROMPT)
    assert max(parts) == 32
    assert ends(link) == ["computed"]
    assert list(bench.answers) == [request.request_id]
    check_gone(bench)


def test_a_request_that_waits_ends_a_look_beside_others(
    idle: Callable[..., Bench], link: FakeLink
) -> None:
    bench = idle(kvshare=SHARE)
    first = bench.add(range(100), max_tokens=60)
    bench.step()
    give(bench, link)
    while len(bench.step().num_scheduled_tokens) < 2:
        pass
    second = bench.add(range(200, 300))
    names = set(bench.step().num_scheduled_tokens)
    assert names == {first.request_id, second.request_id}
    assert ends(link) == ["dropped"]


def test_requests_take_the_blocks_of_a_look(idle: Callable[..., Bench], link: FakeLink) -> None:
    """Rather than each other's."""
    bench = idle(kvshare=SHARE)
    request = bench.add(range(100), max_tokens=200)
    bench.step()
    give(bench, link)
    while len(bench.step().num_scheduled_tokens) < 2:
        pass
    pool = bench.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks())
    while not ends(link):
        bench.step()
    pool.free_blocks(taken)
    bench.drain(300)
    assert ends(link)[0] == "dropped"
    assert (request.num_preemptions, request.num_output_tokens) == (0, 200)


def test_on_a_slow_machine_a_step_has_fewer_tokens(
    idle: Callable[..., Bench], link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that arrives waits for a time and not for a number of tokens."""
    bench = idle(kvshare={"second_look_tokens": 48})
    monkeypatch.setattr(looks_module, "_STEP_S", 0.0)
    monkeypatch.setattr(looks_module, "_PART", 0.0)
    give(bench, link, range(700, 800))
    assert [tokens for tokens in run_out(bench) if tokens] == [48, 32, 20]
    monkeypatch.setattr(looks_module, "_STEP_S", 60.0)
    for first, expected in ((900, [32, 48, 20]), (600, [48, 48, 4])):
        bench.add()
        bench.drain()
        give(bench, link, range(first, first + 100))
        assert [tokens for tokens in run_out(bench) if tokens] == expected
    assert ends(link) == ["computed"] * 3


def test_the_longer_nobody_came_the_longer_a_step_may_take(
    idle: Callable[..., Bench], link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = idle(kvshare={"second_look_tokens": 48})
    monkeypatch.setattr(looks_module, "_STEP_S", 0.0)
    for part, expected in ((0.0, [48, 32, 20]), (1e9, [32, 48, 20])):
        monkeypatch.setattr(looks_module, "_PART", part)
        bench.add()
        bench.drain()
        give(bench, link, range(700, 800) if part == 0.0 else range(900, 1000))
        assert [tokens for tokens in run_out(bench) if tokens] == expected
