"""Two engines on one machine share a daemon; no request gets more than its own engine allows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvshare_store.config import load_config
from kvshare_store.daemon.spawn import ensure_daemon
from tests.engine.harness import Engine
from tests.engine.other import Other

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Other]]:
    home = tmp_path_factory.mktemp("home")
    laxer = {"home": str(home), "policy": "aggressive", "semantic": "never"}
    memory = {"host_bytes": "256MiB", "min_saving_ms": -1e9, "idle_exit_s": 5}
    ensure_daemon(load_config(laxer | memory)).close()
    other = Other(home, kvshare={"policy": "aggressive"})
    try:
        engine = Engine(home, kvshare={"policy": "exact"})
        other.wait()
        yield engine, other
        engine.close()
    finally:
        other.close()


def test_what_one_engine_stored_serves_the_other(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    engine, other = engines
    plain = engine.ask(prompt, policy="off")
    stored, stored_gained = other.store(prompt, policy="exact")
    assert stored_gained["nodes"] == 1
    with engine.counted() as gained:
        answer = engine.ask(prompt)
    assert gained["hits_exact"] == 1
    assert gained["tokens_reused_exact"] == LENGTH - 1
    assert answer.agrees(plain)
    assert answer.agrees(stored)
    engine.check_idle()


def test_and_the_other_way_round(engines: tuple[Engine, Other], prompt: list[int]) -> None:
    engine, other = engines
    with engine.counted() as gained:
        answer = engine.store(prompt)
    assert gained["nodes"] == 1
    served, other_gained = other.store(prompt, policy="exact")
    assert (other_gained["hits_exact"], other_gained["nodes"]) == (1, 0)
    assert served.agrees(answer)


def test_a_request_never_gets_more_than_its_engine_allows(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    """The daemon was started with a laxer policy; the engine's own still holds."""
    engine, _ = engines
    engine.store(prompt)
    follower = [*prompt[:100], 11111, 22222, *prompt[103:]]
    full = engine.ask(follower, policy="off")
    for policy in ("aggressive", "balanced", None):
        with engine.counted() as gained:
            answer = engine.ask(follower, policy=policy)
        assert gained["hits_exact"] == 1
        assert gained["hits_edited"] == gained["tokens_reused_edited"] == 0
        assert answer.agrees(full)


def test_the_other_engine_goes_and_its_leases_with_it(
    engines: tuple[Engine, Other], prompt: list[int]
) -> None:
    engine, other = engines
    assert other.store(prompt, policy="exact")[1]["nodes"] == 1
    other.close()
    with engine.counted() as gained:
        engine.ask(prompt)
    assert gained["hits_exact"] == 1
    engine.check_idle()
