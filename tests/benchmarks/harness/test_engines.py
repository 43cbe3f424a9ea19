"""Engines in processes of their own that take turns, and the store beside them."""

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import engines
from benchmarks.harness.engines import Engine, in_turn


@pytest.mark.parametrize("arms", ["ab", "abc", "abcd", "abcde", "abcdefg"])
def test_every_arm_has_every_place_and_follows_every_other_one_equally_often(arms: str) -> None:
    orders = [in_turn(arms, turn) for turn in range(2 * len(arms))]
    places = Counter((arm, place) for order in orders for place, arm in enumerate(order))
    assert len(places) == len(arms) ** 2
    assert set(places.values()) == {2}
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(pairs) == len(arms) * (len(arms) - 1)
    assert set(pairs.values()) == {2}


STAND_IN = """
import json, sys
print(json.dumps({"version": "0"}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "ask":
        assert command["policy"] == "faithful", command
        result = {"ttft_s": 0.5, "tokens": len(command["tokens"]), "cached": 0, "token_ids": [7],
                  "text": "x", "parts": {"prefill": 0.5}}
    else:
        result = {"ttfts": [t + 1 for t in command["arrivals"]], "seconds": 3.0}
    print(json.dumps({"result": result}), flush=True)
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Let an `Engine` start this program instead of an engine."""
    script = tmp_path / "engine.py"
    script.write_text(code)
    real = engines.EngineProcess.__init__

    def start(self: Engine, name: str, command: list[str], log: object) -> None:
        real(self, name, [sys.executable, str(script)], log)  # type: ignore[arg-type]

    monkeypatch.setattr(engines.EngineProcess, "__init__", start)


def test_an_engine_is_asked_in_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, STAND_IN)
    with engines.started({"one": {}}, {"one": sys.executable}) as started:
        timed = started["one"].ask([1, 2, 3], "salt", policy="faithful")
        assert (timed.tokens, timed.token_ids, timed.parts) == (3, [7], {"prefill": 0.5})
        assert started["one"].replay([0.0, 1.0], [[1], [2]], "salt", 4).ttfts == [1.0, 2.0]


def test_what_a_dead_engine_printed_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, "raise SystemExit('no engine today')")
    with (
        pytest.raises(engines.EngineError, match="no engine today"),
        engines.started({"one": {}}, {"one": sys.executable}),
    ):
        pass


@pytest.mark.slow
def test_a_restart_empties_the_host_tier_and_nothing_else() -> None:
    from kvshare_store.daemon.client import Client
    from kvshare_store.namespace import Namespace
    from kvshare_store.tensors.layout import KVLayout
    from tests.support.daemons import ClientDriver

    namespace = Namespace("model", KVLayout(2, 1, 4, "float32"))
    small = {"host_bytes": 1 << 20, "min_prompt_tokens": 8, "min_saving_ms": 0.0}
    with engines.temporary_home(semantic="never", plan_deadline_ms=20_000.0, **small) as home:
        with Client(home.fields["home"]) as client:
            driver = ClientDriver(client, namespace)
            driver.save(range(100))
            home.restart()
            after = home.stats()
            assert after["nodes"] == 1
            assert after["tiers"]["host"]["blocks"] == 0
            assert after["tiers"]["disk"]["blocks"] > 0
            assert driver.serve([*range(100), 1]).exact == 100
        assert home.stats()["tiers"]["host"]["blocks"] > 0
        home.wait_idle()


class NoHome:
    def settings(self, **own: str) -> dict[str, str]:
        return {"scheduler_cls": "ours"} | own


def test_arms_differ_in_nothing_but_what_they_are_compared_for() -> None:
    def settings(arm: engines.Arm) -> dict[str, Any]:
        return engines.engine_settings("model", arm, NoHome())  # type: ignore[arg-type]

    plain = settings(engines.Arm(caching=False))
    assert settings(engines.Arm(caching=True)) == plain | {"enable_prefix_caching": True}
    ours = settings(engines.Arm(caching=False, kvshare=True))
    assert ours == plain | {"scheduler_cls": "ours"}
    ours = settings(engines.Arm(caching=False, kvshare=True, own={"second_look": "idle"}))
    assert ours == plain | {"scheduler_cls": "ours", "second_look": "idle"}
    other = settings(engines.Arm(caching=False, more={"block_size": 128}))
    assert other == plain | {"block_size": 128}
