"""Second looks in a real engine: edited prompts become exact while it is idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvshare_connectors.vllm.looks as looks_module
import pytest
import torch

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from tests.engine.harness import (
    BLOCK,
    PATIENCE_S,
    TOLERANCE,
    Engine,
    arguments,
    close_kept_engine,
    kept_engine,
)
from tests.support.paged import rows_at
from tests.support.waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

Fresh = Callable[[int], list[int]]
CHUNK = 64
HEAD, REST = 2 * BLOCK, 6 * BLOCK
ANSWER = 8
LINE = [11111, 22222, 33333, 44444, 12345, 23456, 34567, 45678]
"""What is new in the prompt; it is computed behind the exact prefix, so it is exact too."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return kept_engine(
        tmp_path_factory,
        kvshare={
            "policy": "aggressive",
            "second_look": "idle",
            "second_look_tokens": CHUNK,
            "second_look_control": 0.0,
        },
        enable_prefix_caching=True,
        disable_log_stats=False,
    )


@pytest.fixture(autouse=True)
def clean(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_clean(engine, monkeypatch)


def begin_clean(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stored and nothing is on the way; an idle engine asks soon."""
    monkeypatch.setattr(looks_module, "_PAUSES_S", (0.02, 0.1))
    rest(engine)
    engine.clear()
    rest(engine)


def rest(engine: Engine, until: Callable[[], bool] | None = None) -> list[int]:
    """Step until the engine sleeps, or earlier; tokens of each step. Nothing comes out."""
    deadline, tokens = time.monotonic() + 60, []
    while engine.scheduler.has_requests() and not (until and until()):
        assert time.monotonic() < deadline
        assert engine.core.step() == []
        tokens.append(engine.steps[-1].tokens)
    return tokens


def looking(engine: Engine) -> bool:
    """A look has begun, and its first step has been computed."""
    look = engine.scheduler.look
    return look is not None and look.num_computed_tokens > 0


class Talk:
    """A prompt that was served with edited rows, and its next turn."""

    def __init__(self, engine: Engine, fresh: Fresh, *, salt: str | None = None) -> None:
        head, rest_ = fresh(HEAD), fresh(REST)
        engine.store([*head, *fresh(8), *rest_], salt=salt)
        engine.forget()
        self.prompt = [*head, *LINE, *rest_]
        answer = engine.ask(self.prompt, max_tokens=ANSWER, salt=salt)
        self.served = len(engine.steps)
        """How many steps there had been by then."""
        engine.settle()
        assert answer.said["edited"] > 4 * BLOCK
        self.told = [*self.prompt, *answer.tokens[:-1]]
        self.next = [*self.prompt, *answer.tokens, *fresh(8)]


def nodes(engine: Engine) -> dict[int, dict[str, Any]]:
    engine.settle()
    return {node["tokens"]: node for node in engine.client.call(protocol.ListNodes())}


def settle(engine: Engine) -> list[int]:
    """Let the engine be idle until it sleeps."""
    steps = rest(engine)
    engine.settle()
    return steps


def test_an_edited_prompt_and_its_answer_become_exact_while_the_engine_is_idle(
    engine: Engine, fresh: Fresh
) -> None:
    talk = Talk(engine, fresh)
    assert nodes(engine)[len(talk.told)]["generation"] == 1
    settle(engine)
    found = nodes(engine)[len(talk.told)]
    assert (found["generation"], found["exact_rows"]) == (0, len(talk.told))
    steps = [step.tokens for step in engine.steps[talk.served :]]
    scored = ANSWER  # the stored tokens of the answer, and the one before them, once more
    assert sum(steps) == len(talk.told) - HEAD - len(LINE) + scored, "from the exact prefix on"
    assert max(steps) <= CHUNK
    stats = engine.stats()
    assert stats["settled"] >= 1
    assert stats["looks_waiting"] == 0


def test_the_next_turn_finds_an_exact_history(engine: Engine, fresh: Fresh) -> None:
    talk = Talk(engine, fresh)
    settle(engine)
    full = engine.ask(talk.next, policy="off")
    rest(engine)
    engine.forget()
    answer = engine.ask(talk.next)
    assert (answer.said["exact"], answer.said["edited"]) == (len(talk.told), 0)
    assert answer.agrees(full)


def test_what_vllms_own_cache_keeps_of_a_look_is_exact(engine: Engine, fresh: Fresh) -> None:
    talk = Talk(engine, fresh)
    settle(engine)
    answer = engine.ask(talk.next, policy="off")
    assert answer.said["prefix_cached"] == len(talk.told) // BLOCK * BLOCK
    rest(engine)
    engine.forget()
    assert answer.agrees(engine.ask(talk.next, policy="off"))


def test_rows_are_those_of_full_compute(
    engine: Engine, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(engine, fresh)
    rows: list[torch.Tensor] = []
    worker, snapshot = engine.worker, engine.worker.snapshot

    def saving(spec: Any) -> Any:
        positions = torch.arange(len(spec.tokens) // 4)
        slots = torch.tensor(spec.block_ids)[positions // BLOCK] * BLOCK + positions % BLOCK
        rows.append(rows_at(worker.cache, slots))
        return snapshot(spec)

    monkeypatch.setattr(worker, "snapshot", saving)
    settle(engine)
    engine.clear()
    engine.store(talk.told, max_tokens=1)
    looked, full = rows
    assert torch.allclose(looked, full, atol=TOLERANCE)


def test_a_tenants_prompt_stays_the_tenants(engine: Engine, fresh: Fresh) -> None:
    talk = Talk(engine, fresh, salt="tenant")
    settle(engine)
    assert engine.ask(talk.next, policy="off").said["prefix_cached"] == 0
    rest(engine)
    engine.forget()
    assert engine.ask(talk.next).said["reused"] == 0
    rest(engine)
    engine.forget()
    assert engine.ask(talk.next, salt="tenant").said["exact"] == len(talk.told)


def test_a_request_that_arrives_meanwhile_is_served_and_the_look_made_later(
    engine: Engine, fresh: Fresh
) -> None:
    talk, other = Talk(engine, fresh), fresh(3 * BLOCK)
    full = engine.ask(other, policy="off")
    engine.forget()
    rest(engine, until=lambda: looking(engine))
    assert looking(engine)
    name = engine.add(other)
    first = engine.step()
    assert (first.tokens, first.rows) == (len(other), 1), "nothing of the look is in its step"
    assert engine.drain()[name][0].agrees(full)
    settle(engine)
    assert nodes(engine)[len(talk.told)]["generation"] == 0
    assert engine.stats()["looks_dropped"] >= 1


def test_sleep_and_abort_and_reset_drop_it(engine: Engine, fresh: Fresh) -> None:
    core = engine.core.engine_core.engine_core
    for end in (
        lambda: core.pause_scheduler("abort", clear_cache=False),
        lambda: core.pause_scheduler("keep", clear_cache=False),
        lambda: core.sleep(0),
        lambda: core.reset_prefix_cache(),
    ):
        talk = Talk(engine, fresh)
        rest(engine, until=lambda: looking(engine))
        assert looking(engine)
        end()
        assert not engine.scheduler.requests
        assert engine.free_blocks == engine.free_at_start
        core.resume_scheduler()
        engine.settle()
        assert nodes(engine)[len(talk.told)]["generation"] == 1
        engine.scheduler.finish_requests(None, _aborted())
        engine.clear()


def _aborted() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_nothing_is_left_behind(engine: Engine, fresh: Fresh) -> None:
    Talk(engine, fresh)
    settle(engine)
    engine.check_idle()


def test_vllms_metrics_do_not_count_it(engine: Engine, fresh: Fresh) -> None:
    Talk(engine, fresh)
    before, daemons = _metrics(engine), _requests(engine)
    assert sum(settle(engine)) > 0
    assert _metrics(engine) == before
    assert _requests(engine) == daemons, "nor do the daemon's"


def _requests(engine: Engine) -> dict[str, Any]:
    """What the daemon counts of requests."""
    stats = engine.stats()
    counted = {name: stats[name] for name in stats if name.startswith(("hits", "tokens_re"))}
    return counted | {name: stats[name] for name in ("lookups", "misses", "declined")}


def _metrics(engine: Engine) -> dict[str, Any]:
    """Counters of requests, tokens and cache hits; not of scores, which only looks have."""
    counted = ("_tokens", "request_success", "queries", "hits")
    return {
        f"{metric.name} {sorted(metric.labels.items())}": metric.value
        for metric in engine.llm.get_metrics()
        if any(word in metric.name.replace("scored_tokens", "") for word in counted)
        and hasattr(metric, "value")
    }


def test_an_engine_in_a_process_of_its_own_settles_by_itself_and_ends(
    tmp_path: Path, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody makes its steps for it, and it goes at once while it looks."""
    close_kept_engine()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    from vllm import LLM, SamplingParams

    home, wanted = tmp_path / "home", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    kvshare = {
        "policy": "aggressive",
        "second_look": "idle",
        "second_look_tokens": 1,
        "second_look_control": 0.0,
    }
    llm = LLM(**arguments(home, kvshare, ahead=True, enable_prefix_caching=True))
    client = Client(home, timeout=PATIENCE_S)

    def ask(prompt: list[int]) -> None:
        llm.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)

    def stored(count: int) -> bool:
        return len(client.call(protocol.ListNodes())) >= count

    head, rest_ = fresh(HEAD), fresh(2 * REST)  # a look of seconds
    ask([*head, *fresh(8), *rest_])
    until(lambda: stored(1), PATIENCE_S)
    ask([*head, *LINE, *rest_])
    until(lambda: client.stats()["settled"] >= 1, PATIENCE_S)
    assert client.stats()["lookups"] == 2, "a look is no request"
    ask([*head, *LINE[::-1], *rest_])
    until(lambda: client.stats()["looks"] >= 2, PATIENCE_S)
    core = llm.llm_engine.engine_core
    processes = core.resources.engine_manager.processes
    core.shutdown(timeout=PATIENCE_S)
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0], "nobody had to kill it"
    # the engine says so, or the daemon sees that it is gone: another may take the prompt
    assert (stats := client.stats())["looks_waiting"] >= 1, stats
    assert stats["settled"] == 1
    client.stop()
    client.close()
