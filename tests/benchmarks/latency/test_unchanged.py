"""Conversations as they are go to every arm, with a tenant in common and with one each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.engines import Timed
from benchmarks.harness.result import Options
from benchmarks.harness.turns import Turn
from benchmarks.latency import unchanged
from benchmarks.latency.unchanged import Asked

SECONDS = {"prefix": 1.0, "prefix again": 1.1, "kvshare": 0.5}
ASKED = [Asked(0, 1, [1, 2]), Asked(1, 1, [3, 4]), Asked(0, 2, [1, 2, 5]), Asked(1, 2, [3, 4, 6])]


class FakeEngine:
    """Answers in its arm's seconds and records by which tenant it was asked."""

    def __init__(self, arm: str) -> None:
        self.arm = arm
        self.salts: list[str] = []

    def ask(self, tokens: list[int], salt: str, *, max_tokens: int) -> Timed:
        self.salts.append(salt)
        return Timed(SECONDS[self.arm], len(tokens), 1, [7] * max_tokens, "", {})

    def settle(self) -> None:
        pass


class FakeHome:
    def flush(self) -> None: ...

    def wait_idle(self) -> None: ...


def served(kind: str, engines: dict[str, FakeEngine]) -> list[Turn]:
    return unchanged.serve(engines, FakeHome(), kind, ASKED, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "tenants"), [("one tenant", 1), ("a tenant each", 2)])
def test_conversations_share_a_tenant_or_have_one_each(kind: str, tenants: int) -> None:
    engines = {arm: FakeEngine(arm) for arm in SECONDS}
    served(kind, engines)
    first, *others = [engine.salts for engine in engines.values()]
    assert len(set(first)) == tenants
    assert first[0] == first[2]
    assert first[1] == first[3]
    assert others == [first, first]
    before = set(first)
    served(kind, engines)
    assert not before & set(engines["prefix"].salts[4:]), "a part finds nothing of the one before"


def test_later_turns_are_compared_with_prefix_caching() -> None:
    turns = [
        turn
        for kind in ("one tenant", "a tenant each")
        for turn in served(kind, {arm: FakeEngine(arm) for arm in SECONDS})
    ]
    result = unchanged.result_of(turns, Options(data=Path()), "model")
    assert result.n == {"turns of each kind": 2}
    rows = {(row[0], row[1]): row[2:] for row in result.rows}
    assert rows["one tenant", "kvshare"] == [500, "0.50", "0.50 to 0.50", "0.50", 4]
    assert rows["a tenant each", "prefix again"][1] == "1.10"
    assert [(reached, met) for _, reached, met in result.targets] == [
        ("0.50, n = 2", True),
        ("0.50, n = 2", True),
    ]
