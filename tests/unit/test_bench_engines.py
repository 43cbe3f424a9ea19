"""What the timed benchmarks are made of: prompts, turns, timers, and how samples become rows."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import beside, engines, load, misses, ttft_table
from benchmarks.edited import SCATTERED, Texts, TextsError, follower
from benchmarks.engines import Engine, Replayed, Timed, in_turn
from benchmarks.peers import PeerMissingError, make_importable, python_with
from benchmarks.result import Options
from benchmarks.timers import Timers
from kvshare_store.lookup.align import align
from kvshare_store.nodes.edits import as_tokens

NEW = 1_000_000


def numbers(start: int = NEW) -> Iterator[list[int]]:
    """Documents of ten tokens, none of which occurs twice."""
    while True:
        yield list(range(start, start + 10))
        start += 10


# --- prompts --------------------------------------------------------------------------------------


def test_texts_are_never_given_twice() -> None:
    texts = Texts([[1, 2, 3], [4], [5, 6]])
    assert texts.take(2) == [1, 2]
    assert texts.take(3) == [3, 4, 5]
    with pytest.raises(TextsError, match="too few"):
        texts.take(2)


@pytest.mark.parametrize("places", [1, SCATTERED])
@pytest.mark.parametrize("share", [0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("length", [256, 1000, 8160])
def test_a_follower_has_the_share_it_is_asked_for(length: int, share: float, places: int) -> None:
    base = list(range(length))
    made = follower(base, share, places, Texts(numbers()))
    kept = [token for token in made if token < NEW]
    assert len(made) == length
    assert len(kept) == length - round((1 - share) * length)
    assert kept == sorted(set(kept)), "kept text is in its old order"
    edges = sum(a >= NEW > b for a, b in pairwise(made))
    assert edges == places
    assert made[-1] < NEW, "the end is kept text"
    moved = [at for at, token in enumerate(made) if token < NEW and token != at]
    assert len(moved) > length // 10, "something has to be rotated"


def test_nothing_in_common_is_nothing_in_common() -> None:
    assert min(follower(list(range(50)), 0.0, 1, Texts(numbers()))) >= NEW


def test_alignment_finds_what_a_follower_kept() -> None:
    base = list(range(1000))
    made = follower(base, 0.9, SCATTERED, Texts(numbers()))
    found = align(as_tokens(made), as_tokens(base))
    assert sum(match.length for match in found) == 900


# --- turns and timers -----------------------------------------------------------------------------


@pytest.mark.parametrize("arms", ["ab", "abc", "abcd", "abcde", "abcdefg"])
def test_every_arm_has_every_place_and_follows_every_other_one_equally_often(arms: str) -> None:
    orders = [in_turn(arms, turn) for turn in range(2 * len(arms))]
    places = Counter((arm, place) for order in orders for place, arm in enumerate(order))
    assert len(places) == len(arms) ** 2
    assert set(places.values()) == {2}
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(pairs) == len(arms) * (len(arms) - 1)
    assert set(pairs.values()) == {2}


class Machine:
    """Something with a part inside a part."""

    def outer(self) -> str:
        time.sleep(0.02)
        self.inner()
        return "done"

    def inner(self) -> None:
        time.sleep(0.04)

    def fails(self) -> None:
        raise ValueError("no")


def test_time_in_a_part_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timed(Machine):
        pass

    timers = Timers()
    for name in ("outer", "inner", "fails"):
        timers.wrap(Timed, name, name)
    machine = Timed()
    start = time.perf_counter()
    assert machine.outer() == "done"
    total = time.perf_counter() - start
    with pytest.raises(ValueError, match="no"):
        machine.fails()
    taken = timers.take()
    assert taken["inner"] >= 0.04
    assert taken["outer"] >= 0.02
    assert taken["outer"] + taken["inner"] <= total
    assert taken["fails"] < 0.01
    assert timers.take() == {}


# --- processes ------------------------------------------------------------------------------------

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
    """Have an `Engine` start this program and not an engine."""
    script = tmp_path / "engine.py"
    script.write_text(code)
    real = engines.EngineProcess.__init__

    def start(self: Engine, name: str, command: list[str], log: object) -> None:
        real(self, name, [sys.executable, str(script)], log)  # type: ignore[arg-type]

    monkeypatch.setattr(engines.EngineProcess, "__init__", start)


def test_an_engine_is_asked_in_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, STAND_IN)
    with engines.started({"one": {}}) as started:
        timed = started["one"].ask([1, 2, 3], "salt", policy="faithful")
        assert (timed.tokens, timed.token_ids, timed.parts) == (3, [7], {"prefill": 0.5})
        assert started["one"].replay([0.0, 1.0], [[1], [2]], "salt", 4).ttfts == [1.0, 2.0]


def test_what_a_dead_engine_printed_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, "raise SystemExit('no engine today')")
    with pytest.raises(engines.DemoError, match="no engine today"), engines.started({"one": {}}):
        pass


@pytest.mark.slow
def test_a_restart_empties_the_host_tier_and_nothing_else() -> None:
    from kvshare_store.daemon.client import Client
    from kvshare_store.namespace import Namespace
    from kvshare_store.tensors.layout import KVLayout
    from kvshare_store.testing.daemons import ClientDriver

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


def test_arms_share_their_settings() -> None:
    plain = engines.engine_settings("model", caching=False)
    assert engines.engine_settings("model", caching=True) == plain | {"enable_prefix_caching": True}


def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.peers.ENVIRONMENT", tmp_path)
    assert python_with("json") == sys.executable
    with pytest.raises(PeerMissingError, match="make bench-setup"):
        make_importable("a_package_nobody_has")


# --- from samples to rows -------------------------------------------------------------------------


def timed(seconds: float, tokens: int = 2048, token_ids: tuple[int, ...] = (1,)) -> Timed:
    parts = {"lookup": seconds / 4, "prefill": seconds / 2, "rest": seconds / 4}
    return Timed(seconds, tokens, 0, list(token_ids), "", parts)


def test_the_share_of_the_ideal_is_speed_up_times_what_was_computed() -> None:
    sample = ttft_table.Sample(timed(0.2), timed(1.0), 0.1)
    assert sample.times_full == pytest.approx(0.2)
    assert sample.of_ideal == pytest.approx(0.5)


def test_only_settings_that_the_target_is_about_decide_it() -> None:
    def key(length: int, arm: str) -> ttft_table.Key:
        return ttft_table.Key(length, 0.9, "scattered", arm)

    good, bad = (
        ttft_table.Sample(timed(0.1), timed(1.0), 0.08),
        ttft_table.Sample(timed(0.9), timed(1.0), 0.08),
    )
    much = ttft_table.Sample(timed(0.9), timed(1.0), 0.5)
    samples = {
        key(2048, "host balanced"): [good],
        key(2048, "host faithful"): [much],
        key(2048, "disk balanced"): [bad],
        key(256, "host balanced"): [bad],
    }
    _, measured, reached = ttft_table._target(samples, "host")
    assert reached
    assert measured == "median of 1 settings 80%, lowest 80% (2048 tokens: 80%, 1 of 1 reach it)"
    assert not ttft_table._target(samples, "disk")[2]
    assert not ttft_table._target({key(4096, "host aggressive"): [bad]}, "host")[2]
    assert not ttft_table._target({key(2048, "host faithful"): [much]}, "host")[2]


def test_two_engines_that_do_the_same_are_part_of_the_noise() -> None:
    def key(arm: str, share: float = 0.0, length: int = 2048) -> ttft_table.Key:
        return ttft_table.Key(length, share, "one", arm)

    samples = {
        key("full"): [ttft_table.Sample(timed(1.0), timed(1.0), 1.0)],
        key("prefix"): [ttft_table.Sample(timed(0.9), timed(1.0), 1.0)],
        key("prefix", length=512): [ttft_table.Sample(timed(1.1), timed(1.0), 1.0)],
        key("prefix", share=0.9): [ttft_table.Sample(timed(0.1), timed(1.0), 0.1)],
        key("full", length=512): [ttft_table.Sample(timed(1.0), timed(1.0), 1.0)],
    }
    assert "0.90 to 1.10 times" in ttft_table._noise(samples)
    alone = ttft_table._noise({key("full"): samples[key("full")]})
    assert alone.endswith("median deviation 0.0%")


def test_misses_that_were_hits_are_left_out() -> None:
    def triple(ours: float, hit: bool) -> misses.Triple:
        seconds = {"plain": 1.0, "plain again": 1.0, "kvshare": ours}
        parts = dict.fromkeys(("lookup", "plan", "snapshot"), 0.001)
        return misses.Triple(200, seconds, parts, hit, 0.1)

    triples = [triple(1.01, False), triple(1.03, False), triple(1.05, False), triple(0.1, True)]
    made = misses._result(triples, Options(data=Path()), "model")
    assert made.n == {"misses": 3, "hits left out": 1}
    assert made.targets == [("miss overhead ≤ 2 %, median", "+3.0%, n = 3", False)]
    misses.draw(made)


def test_load_says_what_each_arm_serves_and_its_times_beside_plain() -> None:
    def phase(share: float, rate: float) -> load.Phase:
        plain, ours = Replayed([1.0, 2.0, 6.0], 4.0), Replayed([0.5, 1.0, 9.0], 3.0)
        return load.Phase(share, rate, {"plain": plain, "prefix": plain, "kvshare": ours}, 1.0)

    assert load._row(phase(math.inf, math.inf), "kvshare")[:4] == ["at once", "-", "kvshare", 1.0]
    name, rate, _, served, p50, p99, *beside = load._row(phase(0.8, 0.6), "kvshare")
    assert (name, rate, served, p50, p99) == ("80%", 0.6, 1.0, 1000, 9000)
    assert beside == pytest.approx([0.5, 10.5 / 9, 1.5])


def test_traffic_is_half_new_and_the_same_for_one_seed() -> None:
    from random import Random

    sent = load.traffic(Texts(numbers()), 20, Random(1))
    again = load.traffic(Texts(numbers()), 20, Random(1))
    assert sent == again
    assert sent.arrivals == sorted(sent.arrivals)
    known = {token for donor in sent.donors for token in donor}
    shares = [sum(token in known for token in prompt) / len(prompt) for prompt in sent.prompts]
    assert sum(share == 0 for share in shares) == 10
    assert sum(share >= 0.74 for share in shares) == 10


class FakeEngine:
    """Answers every prompt in one second and writes down how it was asked."""

    def __init__(self, name: str, calls: list[tuple[str, str]]) -> None:
        self.name, self.calls = name, calls

    def ask(self, tokens: list[int], salt: str, *, max_tokens: int) -> Timed:
        self.calls.append((self.name, salt))
        return timed(1.0, len(tokens))

    def settle(self) -> None:
        self.calls.append((self.name, "settled"))


class FakeHome:
    def flush(self) -> None: ...

    def wait_idle(self) -> None: ...


@pytest.mark.parametrize("salted", [True, False])
def test_each_kind_of_prompt_goes_to_every_arm(
    monkeypatch: pytest.MonkeyPatch, salted: bool
) -> None:
    monkeypatch.setattr(beside, "_STORED_S", 0.0)
    calls: list[tuple[str, str]] = []
    arms = {name: FakeEngine(name, calls) for name in ("plain", "prefix", "peer", "kvshare")}
    peer = beside.Peer("peer", {}, sys.executable, salted)
    samples = list(beside._serve(arms, peer, FakeHome(), Texts(numbers()), 0))  # type: ignore[arg-type]
    assert [sample.kind for sample in samples] == ["miss", "again", "similar"]
    asked = [name for name, salt in calls if salt != "settled"]
    assert asked == in_turn(list(arms), 0) * 3
    settled = [at for at, call in enumerate(calls) if call == ("kvshare", "settled")]
    assert [calls[at - 1][0] for at in settled] == ["kvshare"] * 3
    assert len(calls) == 3 * (len(arms) + 1)
    assert len({salt for name, salt in calls if name == "kvshare" and salt != "settled"}) == 1
    assert all(bool(salt) is salted for name, salt in calls if name == "peer")


def test_answers_are_compared_with_plain_ones() -> None:
    served = {"plain": timed(1.0), "prefix": timed(0.5), "lmcache": timed(0.25),
              "kvshare": timed(0.2, token_ids=(2,))}  # fmt: skip
    samples = [beside.Sample(kind, served) for kind in ("miss", "again", "similar")] * 2
    made = beside.table("lmcache", "title", [], samples, Options(data=Path(), model="model"))
    row = next(row for row in made.rows if row[:2] == ["similar", "kvshare"])
    assert row[4] == "0.200"
    assert row[-1] == "0 of 2"
    beside.draw(made)


@pytest.mark.slow
def test_gptcache_answers_with_what_it_has_for_a_similar_prompt(tmp_path: Path) -> None:
    from benchmarks.gptcache import GptCacheBaseline

    try:
        baseline = GptCacheBaseline(tmp_path)
    except PeerMissingError:
        pytest.skip("needs `make bench-setup`")
    with baseline:
        baseline.put("How do I bake bread at home?", "Flour and water.")
        baseline.put("What is the capital of France?", "Paris.")
        assert baseline.ask("How can I bake bread in my home?") == "Flour and water."
        assert baseline.ask("Explain quantum tunnelling") is None
