"""How the demo measures: which engine is sent what, and in which order."""

import sys
from pathlib import Path

import pytest

from examples.demo.report import Reuse
from examples.demo.run import arm_settings, main, served
from examples.demo.session import DemoError, Session, Workload, reuse_between
from examples.engines import process
from examples.engines.engine import Answer
from examples.prompts.families import Family

COUNTERS = ("nodes", "tokens_reused_exact", "tokens_reused_edited", "tokens_recomputed")
TINY = Workload([Family("tiny", "donor", ("one", "two"))], ["unrelated"], 2)


class FakeStore:
    """A store that keeps every prompt sent to a KVShare engine, unless it is `full`."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.counts = dict.fromkeys(COUNTERS, 0)

    def stats(self) -> dict[str, int]:
        return dict(self.counts)

    def settle(self, nodes: int, seconds: float) -> bool:
        return not self.full


class FakeArm:
    """Records what it is asked."""

    def __init__(self, name: str, calls: list[tuple], store: FakeStore) -> None:
        self.name, self.calls, self.store = name, calls, store

    def ask(self, text: str, salt: str, max_tokens: int = 1, *, chat: bool = True) -> Answer:
        assert chat is (text != "unrelated"), "a chat template makes every prompt a hit"
        self.calls.append((self.name, text, salt.split("-", 1)[1], max_tokens))
        if self.name in ("kvshare", "identical"):
            self.store.counts["nodes"] += 1
            self.store.counts["tokens_reused_edited"] += 900
            self.store.counts["tokens_recomputed"] += 60
        return Answer(1.0, 1000, 0, [1] * max_tokens, "text")

    def forget(self) -> None:
        self.calls.append((self.name, "forget"))


def session(store: FakeStore) -> tuple[Session, list[tuple]]:
    calls: list[tuple] = []
    arms = {n: FakeArm(n, calls, store) for n in ("full", "prefix", "kvshare", "identical")}
    return Session(TINY, arms, store), calls


def test_a_repetition_begins_fresh_and_sends_donors_first() -> None:
    run, calls = session(FakeStore())
    list(run.followers(0))
    assert calls[:3] == [
        ("prefix", "forget"),
        ("prefix", "donor", "0", 1),
        ("kvshare", "donor", "0", 1),
    ]
    assert [(name, text) for name, text, *_ in calls[3:]] == [
        ("full", "one"), ("prefix", "one"), ("kvshare", "one"),
        ("prefix", "two"), ("kvshare", "two"), ("full", "two"),
    ]  # fmt: skip


def test_answers_come_from_the_first_repetition() -> None:
    run, calls = session(FakeStore())
    for repetition in range(2):
        list(run.followers(repetition))
    lengths = {call[2]: call[3] for call in calls if call[1] == "one"}
    assert lengths["0"] > 1
    assert lengths["1"] == 1
    assert all(len(result.ttfts["full"]) == 2 for result in run.results.followers)


def test_the_reuse_is_the_followers_own() -> None:
    run, _ = session(FakeStore())
    list(run.followers(0))
    assert [result.reuses for result in run.results.followers] == [[Reuse(40, 900, 60)]] * 2


def test_misses_take_turns() -> None:
    run, calls = session(FakeStore())
    list(run.misses(0))
    list(run.misses(1))
    assert [call[0] for call in calls] == ["kvshare", "full", "full", "kvshare"]
    assert run.results.misses == [{"full": [1.0, 1.0], "kvshare": [1.0, 1.0]}]


def test_prompts_are_repeated_where_only_the_store_can_know_them() -> None:
    run, calls = session(FakeStore())
    list(run.repeated())
    assert [call[0] for call in calls] == ["full", "identical", "identical"] * 2
    assert run.results.repeated == [{"full": [1.0, 1.0], "again": [1.0, 1.0]}]


def test_a_donor_that_is_not_kept_stops_the_demo() -> None:
    run, _ = session(FakeStore(full=True))
    with pytest.raises(DemoError, match="donor"):
        list(run.followers(0))


def test_the_progress_bar_ends_where_the_work_does() -> None:
    run, _ = session(FakeStore())
    assert sum(1 for _ in served(run)) == TINY.steps
    assert sum(1 for _ in run.repeated()) == len(TINY.families)


def test_the_short_demo_sends_few_prompts_once_and_starts_three_engines() -> None:
    """What two cores serve in four minutes, if a prompt computed in full takes two seconds."""
    short, full = Workload.short(), Workload()
    assert set(short.families).isdisjoint(full.families), "fewer followers of each"
    assert {f.name for f in short.families} < {f.name for f in full.families}
    assert not short.repeats
    donors, followers = len(short.families), sum(len(f.followers) for f in short.families)
    assert (donors, followers, len(short.misses), short.repetitions) == (5, 10, 2, 1)
    assert short.steps == 17
    assert full.steps > 4 * short.steps
    assert full.repeats


@pytest.mark.parametrize(
    ("counted", "cached", "expected"),
    [
        ((100, 700, 150), 0, Reuse(150 + 100 - 100, 700, 150)),
        ((0, 0, 0), 320, Reuse(320, 0, 680)),
        ((0, 0, 1000), 0, Reuse(0, 0, 1000)),
    ],
    ids=["edited", "only the engine's prefix", "miss"],
)
def test_reuse_adds_up_to_the_prompt(counted, cached: int, expected: Reuse) -> None:
    before = dict.fromkeys(COUNTERS, 5)
    after = dict(zip(COUNTERS, (5, *(5 + count for count in counted)), strict=True))
    reuse = reuse_between(before, after, Answer(0.1, 1000, cached, [1], ""))
    assert reuse == expected
    assert reuse.exact + reuse.edited + reuse.recomputed == 1000


def test_engines_differ_in_nothing_but_what_they_are_compared_for() -> None:
    assert arm_settings("full", "home") == {"enable_prefix_caching": False}
    assert arm_settings("prefix", "home") == {"enable_prefix_caching": True}
    ours, again = arm_settings("kvshare", "home"), arm_settings("identical", "home")
    assert ours.pop("enable_prefix_caching") is True
    assert again.pop("enable_prefix_caching") is False
    assert ours == again
    assert ours["kv_transfer_config"]["kv_connector_extra_config"]["kvshare.home"] == "home"


def test_an_engine_that_dies_ends_the_demo_with_one_line(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    real = process.subprocess.Popen
    dies = [sys.executable, "-c", "raise SystemExit('no engine today')"]
    monkeypatch.setattr(process.subprocess, "Popen", lambda _, **kwargs: real(dies, **kwargs))
    out = tmp_path / "report.json"
    assert main(["--model", str(tmp_path), "--home", str(tmp_path), "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Starting three engines")
    assert "the engine 'full' has stopped" in said
    assert "no engine today" in out.with_suffix(".log").read_text()
    assert not out.exists()
