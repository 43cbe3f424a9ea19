"""Answers are stored: the rows of generated tokens, of whatever way a request has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvshare_store.errors import LeaseError
from tests.engine.harness import Answer, Engine, kept_engine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 112
"""Tokens of a prompt here: three and a half paged blocks, and less than two of the store's."""
ANSWER = 40
"""Tokens of most answers: some more than a paged block."""
NEW = [11111, 22222, 33333, 44444, 12345]
SETTINGS: dict[str, Any] = {
    "kvshare": {"policy": "aggressive"},
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}

Fresh = Callable[[int], list[int]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return kept_engine(tmp_path_factory, **SETTINGS)


@pytest.fixture(autouse=True)
def nothing_left_behind(engine: Engine) -> Iterator[None]:
    engine.clear()
    yield
    engine.check_idle()


@pytest.fixture
def prompt(fresh: Fresh) -> list[int]:
    return fresh(LENGTH)


def lengths(engine: Engine) -> list[int]:
    """Tokens of the stored nodes."""
    engine.settle()
    return sorted(node["tokens"] for node in engine.client.call(list_nodes()))


def check_next_turn(engine: Engine, told: list[int], rows: int) -> Answer:
    """A request that goes on from `told` reuses exactly so many rows, and that changes nothing."""
    turn = [*told, *NEW, *NEW]
    engine.forget()
    full = engine.ask(turn, policy="off")
    engine.forget()
    with engine.counted() as gained:
        answer = engine.ask(turn, policy="exact")
    assert gained["tokens_reused_exact"] == rows
    assert answer.agrees(full)
    return answer
