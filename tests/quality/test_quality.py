"""What `Quality` keeps, for whom, and what restarts and damaged files leave of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality import classes
from kvshare_store.quality import quality as module
from kvshare_store.quality.evidence import MOST_NATS
from kvshare_store.quality.keeping import File, Kept, Packed
from kvshare_store.quality.ladder import Terms
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.report import Wanted
from kvshare_store.quality.score import Score
from tests.quality.streams import LADDER, quality, score


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "quality")


def teach(judge: Quality, policy: str = "faithful", count: int = 400, **of: str) -> None:
    for _ in range(count):
        judge.observe(score(policy, **of))  # type: ignore[arg-type]


def rungs(judge: Quality, count: int = 50, **of: str) -> set[str]:
    """The policies that most requests get."""
    asked = {"namespace": "n", "traffic": "t", "configured": "aggressive", **of}
    got = [judge.rung(**asked) for _ in range(count)]
    return {policy for policy in set(got) if got.count(policy) > count // 4}


def test_a_request_gets_no_laxer_policy_than_it_asked_for() -> None:
    judge = quality()
    teach(judge, "aggressive")
    assert rungs(judge) == {"aggressive"}
    assert rungs(judge, configured="balanced") == {"exact"}  # nothing is known of that
    teach(judge, "faithful")
    assert rungs(judge, configured="balanced") == {"faithful"}
    assert rungs(judge, configured="exact") == {"exact"}
    assert rungs(judge, configured="off") == {"off"}


def test_without_a_bound_the_configured_policy_stays_and_quality_is_known() -> None:
    judge = quality(0.0)
    for diverged in (True,) * 50 + (False,) * 50:
        judge.observe(score("balanced", diverged))
    assert rungs(judge, configured="balanced") == {"balanced"}
    (known,) = judge.report()
    assert (known.rung, known.tried) == ("", "")
    assert known.policies[0].diverged.mean == 0.5


def test_a_bound_that_is_set_later_finds_what_was_learned() -> None:
    judge = quality(0.0)
    teach(judge, "balanced")
    judge.reload(Terms(0.02, 0.05))
    assert rungs(judge) == {"balanced"}
    judge.reload(Terms(0.001, 0.05))
    assert rungs(judge) == {"exact"}


def test_the_limits_that_are_reported_are_those_that_the_ladder_goes_by() -> None:
    judge = quality(0.02)
    for at in range(700):
        judge.observe(score("faithful"))
        judge.observe(score("balanced", at % 150 == 0))
        if at % 3 == 0:
            judge.observe(score(control=True))
        (known,) = judge.report()
        within = [one.policy for one in known.policies if one.extra.high <= 0.02]
        laxest = max(within, key=LADDER.index, default="exact")
        assert known.rung == laxest
    assert known.rung == "faithful"


def test_a_part_of_the_classes_is_reported() -> None:
    judge = quality()
    for at in range(10):
        teach(judge, traffic=f"t{at}", count=at + 1)
        teach(judge, namespace="other", traffic=f"t{at}", count=1)
    first = judge.report(Wanted("n", most=3))
    assert [one.traffic for one in first] == ["t9", "t8", "t7"], "the most scored ones first"
    assert [one.traffic for one in judge.report(Wanted("n", start=8, most=3))] == ["t1", "t0"]
    assert judge.report(Wanted("n", start=10)) == []
    assert judge.counts(Wanted("n", most=3)) == (10, 10, 0)
    assert judge.counts(Wanted()) == (20, 20, 0)
    (one,) = judge.report(Wanted("o", "t3"))
    assert (one.namespace, one.traffic) == ("other", "t3")


def test_tenants_and_classes_learn_apart() -> None:
    judge = quality()
    teach(judge, namespace="n", traffic="t")
    assert rungs(judge) == {"faithful"}
    assert rungs(judge, namespace="m") == {"exact"}
    assert rungs(judge, traffic="other") == {"exact"}
    for _ in range(400):
        judge.observe(score(diverged=True, control=True, namespace="m"))
    assert {one.namespace: one.floor.greedy for one in judge.report()} == {"n": 0}


def test_sampled_answers_say_nothing_of_divergence() -> None:
    judge = quality()
    for _ in range(400):
        judge.observe(score(greedy=False, diverged=True))
    assert rungs(judge) == {"exact"}
    (known,) = judge.report()
    assert (known.policies[0].greedy, known.policies[0].sampled) == (0, 400)
    assert known.policies[0].sampled_regret.mean == pytest.approx(0.75)


@pytest.mark.parametrize("policy", ["exact", "off", "", "made up"])
def test_scores_of_no_policy_of_the_ladder_are_ignored(policy: str) -> None:
    judge = quality()
    judge.observe(score(policy, diverged=True))
    assert judge.report() == []


def test_regrets_are_reported_beside_those_of_controls() -> None:
    judge = quality()
    for at in range(1000):
        regret = 2 * MOST_NATS if at % 100 == 0 else 0.0
        judge.observe(msgspec.structs.replace(score("balanced"), regrets=(regret,)))
        judge.observe(msgspec.structs.replace(score(control=True), regrets=(0.01,)))
    (known,) = judge.report()
    (balanced,) = known.policies
    assert balanced.regret.mean == pytest.approx(MOST_NATS / 100)  # cut at the most that counts
    assert known.floor.regret.mean == pytest.approx(0.01)
    assert balanced.extra_regret.mean == pytest.approx(0.03)
    assert balanced.extra_regret.low < 0.03 < balanced.extra_regret.high
    assert balanced.extra.mean == pytest.approx(0.01 - 1.0)


def test_it_keeps_the_classes_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_CLASSES", 8)
    monkeypatch.setattr(classes, "_OF_NAMESPACE", 4)
    judge = quality()
    teach(judge, traffic="mine", namespace="n")
    for at in range(20):
        rungs(judge, 1, traffic="mine")
        judge.observe(score(traffic=f"other {at}"))
        judge.observe(score(traffic=f"other {at}", namespace="greedy tenant"))
    names = [(one.namespace, one.traffic) for one in judge.report()]
    assert len(names) == 8
    assert ("n", "mine") in names
    teach(judge, traffic="last", count=1)
    assert rungs(judge, traffic="mine") == {"faithful"}
    assert rungs(judge, traffic="other 0") == {"exact"}


# --- restarts ----------------------------------------------------------------------------------


def test_a_restart_keeps_what_was_learned(file: File) -> None:
    judge = quality(file=file)
    teach(judge)
    judge.observe(score(control=True))
    before = judge.report()
    judge.close()
    again = quality(file=file)
    assert again.report()[0].floor.greedy == 1
    assert again.report() == before
    assert rungs(again) == {"faithful"}


def test_what_makes_a_class_stricter_is_written_at_once(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    judge = quality(file=file)
    teach(judge)
    judge.close()
    caplog.set_level("INFO", "kvshare")
    while judge.report()[0].rung == "faithful":
        judge.observe(score(diverged=True))
    assert quality(file=file).report() == judge.report()  # as after a kill
    assert "class t is exact now, was faithful" in caplog.text


@pytest.mark.parametrize("killed", [False, True])
def test_a_restart_does_not_end_the_silence(file: File, killed: bool) -> None:
    now = 1e9
    judge = quality(file=file, clock=lambda: now)
    teach(judge, count=1000)
    judge.close()
    assert rungs(judge, 1000) == {"faithful"}
    assert rungs(judge) == {"exact"}, "nobody has scored for so long"
    now += 31
    judge.keep() if killed else judge.close()
    assert rungs(quality(file=file, clock=lambda: now)) == {"exact"}


def test_a_kill_loses_nothing_bad(file: File) -> None:
    judge = quality(file=file)
    teach(judge, count=1500)
    judge.observe(score(diverged=True))
    assert judge.report()[0].rung == "faithful", "one alone changes nothing"
    assert quality(file=file).report() == judge.report()


def test_what_has_not_changed_is_not_written_again(file: File, tmp_path: Path) -> None:
    now = 1e9
    judge = quality(file=file, clock=lambda: now)
    teach(judge)
    judge.keep()
    assert not (tmp_path / "quality").exists(), "it is not time"
    now += 31
    judge.keep()
    before = (tmp_path / "quality").stat().st_mtime_ns
    now += 31
    judge.keep()
    assert (tmp_path / "quality").stat().st_mtime_ns == before


def test_the_rest_is_written_now_and_then(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WRITE_S", 0.0)
    teach(quality(file=file))
    assert rungs(quality(file=file)) == {"faithful"}


@pytest.mark.parametrize(
    "damage", ["torn", "flipped", "empty", "nonsense", "huge", "a folder", "a pipe"]
)
def test_a_damaged_file_is_counted_and_all_begin_anew(
    file: File, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "quality"
    judge = quality(file=file)
    teach(judge)
    judge.close()
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a pipe":
        os.mkfifo(path)
    elif damage == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.write_bytes(
            {
                "torn": whole[: len(whole) // 2],
                "flipped": whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
                "empty": b"",
                "nonsense": os.urandom(100),
            }[damage]
        )
    metrics = Metrics()
    again = quality(file=file, metrics=metrics)
    assert rungs(again) == {"exact"}
    assert metrics.errors == {"corrupt": 1}


def test_what_was_learned_of_other_policies_does_not_count(
    file: File, caplog: pytest.LogCaptureFixture
) -> None:
    judge = quality(file=file, meaning="windows of 64")
    teach(judge)
    judge.close()
    assert rungs(quality(file=file, meaning="windows of 64")) == {"faithful"}
    assert not caplog.records
    assert rungs(quality(file=file, meaning="windows of 8")) == {"exact"}
    assert "they do not count now" in caplog.text


def test_with_a_key_the_file_says_nothing(tmp_path: Path) -> None:
    judge = quality(file=File(tmp_path / "quality", b"k" * 32))
    teach(judge, namespace="a tenant's")
    judge.close()
    assert b"tenant" not in (tmp_path / "quality").read_bytes()
    again = quality(file=File(tmp_path / "quality", b"k" * 32))
    assert rungs(again, namespace="a tenant's") == {"faithful"}
    assert rungs(quality(file=File(tmp_path / "quality", b"l" * 32)), namespace="a tenant's") == {
        "exact"
    }


def test_a_disk_that_refuses_costs_no_score(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    judge = quality(file=file, metrics=metrics)

    def full(path: str, parts: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        patched.setattr(module, "_WRITE_S", 0.0)
        teach(judge)
    assert rungs(judge) == {"faithful"}
    assert metrics.errors["storage"] == 400
    judge.close()  # there is room again
    assert rungs(quality(file=file)) == {"faithful"}


def test_no_request_waits_while_the_file_is_encoded(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = quality(file=file)
    teach(judge)
    judge.observe(score(control=True))
    learned = judge.report()
    waited: list[bool] = []

    def slow(kept: Kept | Packed) -> bytes | bytearray:
        request = threading.Thread(target=rungs, args=(judge, 1), daemon=True)
        request.start()
        request.join(5)
        waited.append(request.is_alive())
        return File.encode(file, kept)

    with monkeypatch.context() as patched:
        patched.setattr(file, "encode", slow)
        judge.close()
    assert waited == [False]
    assert quality(file=file).report() == learned


def test_a_purge_leaves_nothing_in_the_file(file: File, tmp_path: Path) -> None:
    judge = quality(file=file)
    teach(judge, namespace="gone", traffic="secret")
    teach(judge, namespace="stays", count=1)
    judge.observe(score(control=True, namespace="gone"))
    judge.close()
    assert b"secret" in (tmp_path / "quality").read_bytes()
    judge.forget("gone")
    assert [one.namespace for one in judge.report()] == ["stays"]
    kept = (tmp_path / "quality").read_bytes()
    assert b"gone" not in kept
    assert b"secret" not in kept


def test_a_purge_leaves_nothing_in_a_file_of_other_policies(file: File, tmp_path: Path) -> None:
    judge = quality(file=file, meaning="windows of 64")
    teach(judge, namespace="gone")
    judge.close()
    quality(file=file, meaning="windows of 8").close()
    assert b"gone" in (tmp_path / "quality").read_bytes(), "these policies may come back"
    quality(file=file, meaning="windows of 8").forget("gone")
    assert b"gone" not in (tmp_path / "quality").read_bytes()
    assert rungs(quality(file=file, meaning="windows of 64"), namespace="gone") == {"exact"}


@pytest.mark.parametrize("days", [8, -8])
def test_a_class_that_stays_exact_is_tried_again_after_a_week(days: int) -> None:
    now = 1e9
    judge = quality(clock=lambda: now)
    for _ in range(1000):
        judge.observe(score(control=True))
    for _ in range(40):
        judge.observe(score(diverged=True))
    assert judge.report()[0].tried == ""
    now += days * 86_400
    judge.rung("n", "t", "aggressive")
    assert (judge.report()[0].tried, judge.report()[0].epoch) == ("faithful", 2)


def test_many_threads_at_once(file: File) -> None:
    judge = quality(file=file)

    def work(traffic: str) -> None:
        for _ in range(200):
            judge.observe(score(traffic=traffic))
            judge.rung("n", traffic, "aggressive")
            judge.report()

    threads = [threading.Thread(target=work, args=(f"t{at % 2}",)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.policies[0].greedy for one in judge.report()] == [400, 400]


def test_scores_are_what_engines_may_send() -> None:
    assert msgspec.convert(msgspec.to_builtins(score()), Score) == score()
