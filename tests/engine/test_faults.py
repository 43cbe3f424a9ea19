"""Faults: whatever happens to daemon, arena or disk, answers are right and reuse recovers."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kvshare_connectors.vllm import promises

from kvshare_store.blocks.tiers.host.arena import Arenas
from kvshare_store.daemon.address import home_taken
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Welcome
from kvshare_store.errors import LeaseError
from tests.engine.harness import Engine, Fresh, half
from tests.support.waiting import until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.fault,
    pytest.mark.filterwarnings("ignore"),
]

LENGTH = 130
DEADLINE_S = 1.0
RECOVERY_S = 60.0
SETTINGS = {
    "kvshare": {"policy": "aggressive", "plan_deadline_ms": DEADLINE_S * 1e3},
    "enable_prefix_caching": True,
}


# --- loads that fail ------------------------------------------------------------------------------


@contextmanager
def failing_loads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every load fails; ids of the requests that tried."""
    tried = []

    def fail(spec: Any) -> int:
        tried.append(spec.request_id)
        raise LeaseError("forced")

    with monkeypatch.context() as patch:
        patch.setattr(engine.worker, "load_one", fail)
        yield tried


@contextmanager
def cleared_labels(engine: Engine) -> Iterator[None]:
    """Between plan and load the arena gives a block's place to another block."""
    worker, load = engine.worker, engine.worker.load_one

    def late(spec: Any) -> int:
        at, blocks = spec.plan.spans[-1].block, list(spec.plan.blocks)
        blocks[at] = msgspec.structs.replace(blocks[at], seq=blocks[at].seq - 1)
        plan = msgspec.structs.replace(spec.plan, blocks=tuple(blocks))
        return load(dataclasses.replace(spec, plan=plan))

    worker.load_one = late
    try:
        yield
    finally:
        worker.load_one = load


BUDGETS = pytest.mark.parametrize("budget", [16, None], ids=["parked", "same step"])


@pytest.mark.parametrize(
    ("edited", "budget"),
    [(True, 16), (True, None), (False, None)],
    ids=["edited, parked", "edited", "exact"],
)
def test_a_failed_load_is_a_miss(
    engine: Engine,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    edited: bool,
    budget: int | None,
) -> None:
    full = engine.store(prompt)
    reuse: AbstractContextManager[None] = engine.keeping(half) if edited else nullcontext()
    hit = "hits_edited" if edited else "hits_exact"
    engine.forget()
    fails = failing_loads(engine, monkeypatch)
    with engine.counted() as gained, engine.budget(tokens=budget), reuse, fails as tried:
        assert engine.ask(prompt).agrees(full)
    assert len(tried) == 1
    assert gained["declined.load_lease"] == gained["errors.lease"] == 1
    assert gained[hit] == gained["tokens_reused_edited"] == gained["tokens_reused_exact"] == 0
    assert gained["tokens_recomputed"] == LENGTH
    engine.forget()
    reuse = engine.keeping(half) if edited else nullcontext()
    with engine.counted() as gained, engine.budget(tokens=budget), reuse:
        assert engine.ask(prompt).agrees(full)
    assert gained[hit] == 1


class Unmappable(Client):
    """A client of a daemon that was killed while it made its shared memory."""

    def greet(self, timeout: float | None = None) -> Welcome:
        welcome = super().greet(timeout)
        os.close(self.arena)
        self.arena = os.memfd_create("empty")
        return welcome


def test_shared_memory_that_cannot_be_mapped_is_a_miss(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = engine.store(prompt)
    engine.forget()
    with engine.counted() as gained, monkeypatch.context() as patch:
        patch.setattr("kvshare_connectors.vllm.worker.Client", Unmappable)
        patch.setattr(engine.worker, "arenas", Arenas())
        assert engine.ask(prompt).agrees(full)
    assert gained["declined.load_storage"] == gained["errors.storage"] == 1
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 1


@BUDGETS
def test_a_block_that_left_the_arena_is_a_miss(
    engine: Engine, prompt: list[int], budget: int | None
) -> None:
    full = engine.store(prompt)
    engine.forget()
    reuse, cleared = engine.keeping(half), cleared_labels(engine)
    with engine.counted() as gained, engine.budget(tokens=budget), reuse, cleared:
        assert engine.ask(prompt).agrees(full)
    assert gained["declined.load_lease"] == 1
    assert gained["hits_edited"] == gained["hits_exact"] == 0


@BUDGETS
def test_a_failed_load_leaves_nothing_wrong_in_the_prefix_cache(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    longer = [*prompt, *prompt[:20]]
    engine.store(prompt)
    full = engine.ask(longer, policy="off")
    engine.forget()
    with engine.budget(tokens=budget), failing_loads(engine, monkeypatch) as tried:
        engine.ask(prompt)
        assert engine.ask(longer, policy="off").agrees(full)
    assert tried


def test_an_abort_after_a_failed_load_leaves_nothing_wrong_in_the_prefix_cache(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM had published the blocks, and no request will compute them now."""
    longer = [*prompt, *prompt[:20]]
    engine.store(prompt)
    engine.forget()
    full = engine.ask(longer, policy="off")
    engine.forget()
    with failing_loads(engine, monkeypatch) as tried:
        name = engine.add(prompt)
        engine.step()
        engine.abort(name)
    assert tried
    assert engine.ask(longer, policy="off").agrees(full)


def test_what_was_computed_after_a_failed_load_is_stored(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = engine.ask(prompt, policy="off")
    engine.store(prompt[:100])
    engine.forget()
    with failing_loads(engine, monkeypatch) as tried, engine.counted() as gained:
        engine.store(prompt, policy="exact")
    assert len(tried) == gained["nodes"] == 1
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt, policy="exact").agrees(full)
    assert gained["tokens_reused_exact"] == LENGTH - 1


def test_requests_that_share_blocks_with_a_failed_load_in_its_step(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM publishes a request's blocks before they are loaded; other requests of the step hit
    them."""
    longer = [*prompt, *prompt[:40]]
    full, full_longer = engine.store(prompt), engine.ask(longer, policy="off")
    engine.store(longer, policy="exact")
    other = [*prompt[:110], *prompt[:30]]
    full_other = engine.ask(other, policy="off")
    engine.forget()
    fails = iter([True])
    load = engine.worker.load_one

    def first_fails(spec: Any) -> int:
        if next(fails, False):
            raise LeaseError("forced")
        return load(spec)

    with engine.counted() as gained, monkeypatch.context() as patch:
        patch.setattr(engine.worker, "load_one", first_fails)
        first = engine.add(prompt)
        with engine.keeping(lambda length: [(0, 133), (136, length - 2)]):
            second = engine.add(longer)
            third = engine.add(other, policy="off")
            answers = engine.drain()
    assert gained["declined.load_lease"] == 2
    assert answers[first][0].agrees(full)
    assert answers[second][0].agrees(full_longer)
    assert answers[third][0].agrees(full_other)
    for text, answer in ((prompt, full), (longer, full_longer), (other, full_other)):
        assert engine.ask(text, policy="off").agrees(answer)


def test_rows_computed_beside_a_failed_load_are_not_stored(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour that hit the failed request's blocks computed its rows from rows that never
    came."""
    longer = [*prompt[:120], *prompt[50:90]]
    engine.store(prompt)
    engine.forget()
    full = engine.ask(longer, policy="off")
    engine.forget()
    with monkeypatch.context() as patch:
        patch.setattr(
            promises,
            "saves_enough",
            lambda plan, spans, least: bool(spans) and not spans[0].start,
        )
        with failing_loads(engine, monkeypatch) as tried:
            engine.add(prompt, policy="exact")
            engine.add(longer, policy="exact")
            engine.drain()
    assert len(tried) == 1
    engine.forget()
    assert engine.ask(longer, policy="exact").agrees(full)


# --- the daemon -----------------------------------------------------------------------------------


@contextmanager
def waits(engine: Engine) -> Iterator[list[float]]:
    """Seconds that the engine was ready to wait for plans: of a daemon that says nothing, what it
    did wait, however busy the machine is."""
    link, waited = engine.planning.lookups.link, []
    answer = link.answer

    def watched(request_id: bytes, seconds: float) -> Any:
        waited.append(seconds)
        return answer(request_id, seconds)

    link.answer = watched  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        link.answer = answer  # type: ignore[method-assign]


def exact_hits(engine: Engine) -> int:
    """Of the daemon that answers now; 0 if none does."""
    try:
        return int(engine.client.stats()["hits_exact"])
    except OSError:
        engine.client.reconnect()
        return 0


def comes_back(engine: Engine, prompt: list[int], hits: int) -> None:
    """Ask until the store is used again, with more than `hits` exact hits."""
    deadline = time.monotonic() + RECOVERY_S
    while exact_hits(engine) <= hits:
        assert time.monotonic() < deadline, "the store did not come back"
        engine.forget()
        engine.ask(prompt, policy="exact", max_tokens=1)
        time.sleep(0.3)


def test_a_killed_daemon_comes_back_with_what_was_committed(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    full = engine.store(prompt)
    engine.forget()
    running = engine.add(fresh(50), max_tokens=30)
    engine.step()
    killed = engine.daemon
    os.kill(killed, signal.SIGKILL)
    with waits(engine) as waited:
        waiting = engine.add(prompt)
        answers = engine.drain()
    assert sum(waited) < 2 * DEADLINE_S
    assert answers[waiting][0].agrees(full)
    assert len(answers[running][0].tokens) == 30
    engine.client.reconnect()
    comes_back(engine, prompt, 0)
    assert engine.daemon != killed
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 1


def test_a_frozen_daemon_costs_no_more_than_the_deadline(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    others = [fresh(60) for _ in range(4)]
    full = [engine.ask(text, policy="off") for text in (prompt, *others)]
    engine.store(prompt)
    engine.forget()
    frozen, hits = engine.daemon, exact_hits(engine)
    os.kill(frozen, signal.SIGSTOP)
    try:
        with waits(engine) as first:
            names = [engine.add(text) for text in (prompt, *others)]
            answers = engine.drain()
        with waits(engine) as second:
            again = engine.ask(others[0])
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert first
    assert sum(first) < 2 * DEADLINE_S  # of five requests
    assert sum(second) < 2 * DEADLINE_S
    for name, plain in zip(names, full, strict=True):
        assert answers[name][0].agrees(plain)
    assert again.tokens == full[1].tokens
    assert engine.stats()["leases"] == 0  # nothing was leased for requests that no longer waited
    comes_back(engine, prompt, hits)
    assert engine.daemon == frozen


def test_a_daemon_that_pauses_for_a_moment_is_waited_for_while_others_decode(
    engine: Engine, prompt: list[int], fresh: Fresh
) -> None:
    """A step with other work waits only a few milliseconds; the plan is used when it comes."""
    engine.store(prompt)
    engine.forget()
    with engine.counted() as gained:
        engine.add(fresh(50), policy="off", max_tokens=10)
        engine.step()
        paused = engine.daemon
        os.kill(paused, signal.SIGSTOP)
        try:
            name = engine.add(prompt)
            with waits(engine) as waited:
                decoded = engine.step()
        finally:
            os.kill(paused, signal.SIGCONT)
        assert decoded.rows == 1
        assert sum(waited) < DEADLINE_S / 10
        assert len(engine.drain()[name][0].tokens) == 4
    assert gained["hits_exact"] == 1
    assert gained["errors.timeout"] == 0


def test_what_waits_for_a_frozen_daemon_does_not_fill_memory(
    engine: Engine, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, frozen = engine.worker.saver, engine.daemon
    row_bytes = engine.worker.cache.layout.row_bytes
    small = msgspec.structs.replace(saver.config, host_bytes=20 * row_bytes)
    monkeypatch.setattr(saver, "config", small)
    os.kill(frozen, signal.SIGSTOP)
    try:
        for _ in range(4):
            engine.ask(fresh(40), max_tokens=1)
        assert saver.waiting_bytes <= 64 * row_bytes
    finally:
        os.kill(frozen, signal.SIGCONT)
    engine.settle()
    assert errors(engine)["no_space"] >= 1


def test_a_flipped_byte_on_disk_is_a_miss(engine: Engine, prompt: list[int]) -> None:
    full = engine.store(prompt)
    engine.forget()
    engine.client.stop()
    until(lambda: not home_taken(engine.home), RECOVERY_S)
    for path in block_files(engine.home):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    deadline = time.monotonic() + RECOVERY_S
    while not errors(engine)["corrupt"]:
        assert time.monotonic() < deadline, "the damage was not noticed"
        engine.forget()
        assert engine.ask(prompt, policy="exact").agrees(full)
        time.sleep(0.3)
    comes_back(engine, prompt, 0)
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt, policy="exact").agrees(full)
    assert gained["hits_exact"] == 1


def errors(engine: Engine) -> Counter[str]:
    """Of the daemon that answers now; none if none does."""
    try:
        return Counter(engine.client.stats()["errors"])
    except OSError:
        engine.client.reconnect()
        return Counter()


def block_files(home: Path) -> list[Path]:
    return [path for path in home.glob("blocks/**/*") if path.is_file()]


# --- another model --------------------------------------------------------------------------------


def test_rows_of_another_model_are_a_miss(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = engine.store(prompt)
    other = msgspec.structs.replace(engine.planning.namespace, revision="another")
    hits = []
    for namespace in (other, engine.planning.namespace):
        engine.forget()
        monkeypatch.setattr(engine.planning, "namespace", namespace)
        with engine.counted() as gained:
            assert engine.ask(prompt, policy="exact").agrees(full)
        hits.append(gained["hits_exact"])
    assert hits == [0, 1]
