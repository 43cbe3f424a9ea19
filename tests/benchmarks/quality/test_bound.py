"""The bound on recorded streams: what is recorded of a request, and what a replay makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.methods.base import full_compute, generate, teacher_forced
from benchmarks.quality import bound, bound_replay
from benchmarks.quality.bound_prompts import Asked
from benchmarks.quality.bound_recording import Recorder, Recording, edit_kind, name_of, regrets
from benchmarks.quality.bound_replay import (
    AFTER,
    LADDER,
    Outcome,
    as_text,
    extra_rates,
    from_text,
    halves,
    replay,
)
from kvshare_store.quality.ladder import Terms
from tests.transformers.tiny import prompt_of

TERMS = Terms(0.1, 0.05)


def outcomes(*marks: str, kind: str = "replace") -> list[Outcome]:
    """Of marks as `as_text` writes them."""
    lines = [f"{kind} {mark[:3]} {mark[3:]}" for mark in marks]
    return from_text("\n".join(["# made", *lines]))["made"]


def test_outcomes_are_the_same_after_they_were_text() -> None:
    streams = {"one of them": outcomes("-010", "1111"), "another": outcomes("---0", kind="append")}
    assert from_text(as_text(streams)) == streams


def test_extra_is_beyond_the_same_requests_control() -> None:
    pool = outcomes("-110", "0111", "0010", "0000") + outcomes("1111", kind="insert")
    assert extra_rates(pool) == {"replace": (0.0, 0.0, 0.25, 0.5), "insert": (0.0,) * 4}


def test_a_rung_that_diverges_less_than_full_compute_earns_nothing() -> None:
    assert extra_rates(outcomes("0001", "0000")) == {"replace": (0.0,) * 4}


def test_the_half_that_diverges_more_comes_last() -> None:
    good, bad = outcomes("0000") * 3, outcomes("0110") * 3
    assert halves([*bad, *good]) == [good, bad]


def test_a_harmless_stream_loosens_and_a_harmful_one_ends_at_exact() -> None:
    harmless = replay([outcomes("0000")], TERMS, 2000, 0, scored=1.0)
    assert (harmless.extra, harmless.counted, harmless.last) == (0.0, 0.0, LADDER[-1])
    assert harmless.edited > 0.7
    harmful = replay([outcomes("1110", "0110")], TERMS, 2000, 0, scored=1.0, controls=0.5)
    assert harmful.last == "exact"
    assert 0 < harmful.extra < 0.03
    assert harmful.most <= TERMS.bound


def test_what_is_promised_is_what_happens_but_for_chance() -> None:
    made = [replay([outcomes("0110", "0010", "0000")], TERMS, 2000, seed) for seed in range(8)]
    expected = sum(one.extra for one in made)
    assert expected == pytest.approx(sum(one.counted for one in made), rel=0.15)
    assert all(len(one.classes) == 1 and one.classes[0] == one.most for one in made)


def test_a_stream_beyond_the_bound_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves all requests as configured must not look as if it kept to the bound."""
    monkeypatch.setattr(bound_replay, "Quality", _Unbounded)
    made = replay([outcomes("0010", "0000", "0000")], TERMS, AFTER + 200, 0)
    assert made.counted == pytest.approx(1 / 3, abs=0.1)
    assert made.counted > TERMS.bound


class _Unbounded(bound_replay.Quality):
    def rung(self, namespace: str, traffic: str, configured: str) -> str:
        return configured


def test_classes_of_a_stream_learn_apart() -> None:
    pool = outcomes("0000") + outcomes("1110", kind="several")
    made = replay([pool], TERMS, 3000, 0, scored=1.0, controls=0.5)
    assert len(made.classes) == 2
    assert min(made.classes) == 0 < max(made.classes) <= TERMS.bound
    assert 0.3 < made.edited < 0.55


# --- recording ------------------------------------------------------------------------------------


@pytest.fixture
def recorder(llama: RowEngine) -> Recorder:
    return Recorder(llama, "tiny", (2,))


def edited() -> Asked:
    """One token changed before much that stays."""
    donor = prompt_of(160)
    return Asked((*donor[:4], 1 + donor[4] % 90, *donor[5:150], 3, 4), tuple(donor))


def test_every_rung_is_recorded(recorder: Recorder) -> None:
    (one,) = recorder.record([edited()])
    assert (one.kind, one.tokens) == ("replace", 152)
    faithful, balanced, aggressive = (answer.edited for answer in one.rungs)
    assert 0 == faithful < balanced < aggressive < one.tokens, "too short for `faithful`"
    assert [0 < len(answer.regrets) <= 16 for answer in one.rungs] == [False, True, True]
    assert one.control.regrets
    assert not one.control.diverged, "in float32 full compute agrees with itself"


def test_what_reuses_nothing_is_not_scored(recorder: Recorder) -> None:
    (one,) = recorder.record([Asked(tuple(prompt_of(100)), tuple(prompt_of(100, seed=1)))])
    assert [(answer.edited, answer.regrets) for answer in one.rungs] == [(0, ())] * 3
    assert one.control.regrets


def test_a_regret_is_how_much_likelier_the_best_token_was(llama: RowEngine) -> None:
    ready = full_compute(llama, prompt_of(40))
    (best,) = generate(llama, [ready], 6)
    other = [*best[:2], (best[2] + 1) % 97]
    found = regrets(llama, ready, [best, other, best[:1]])
    assert found[0] == [0.0] * 6
    assert found[2] == [0.0]
    said = teacher_forced(llama, ready, other)[2]
    assert found[1][2] == pytest.approx(float(said.max() - said[other[2]]), rel=1e-4)
    assert found[1][2] > 0


def test_the_kind_of_edit_is_that_of_the_store() -> None:
    text = tuple(range(100))
    assert edit_kind(Asked((*text, 7, 8), text)) == "append"
    assert edit_kind(Asked((*text[:30], 300, *text[30:]), text)) == "insert"
    assert edit_kind(Asked((300, *text[1:50], 301, *text[51:]), text)) == "several"


def test_a_run_goes_on_from_what_is_recorded(recorder: Recorder, tmp_path: Path) -> None:
    path = tmp_path / "samples" / "recorded.jsonl"
    first, second, third = edited(), Asked(*reversed(edited())), Asked(edited().donor, (1, 2, 3))
    assert recorder.record([]) == []
    made = recorder.record([first, second])
    assert made == [*recorder.record([first]), *recorder.record([second])]
    Recording(path).add(made[:1])
    path.write_bytes(path.read_bytes() + b'{"name": "torn')
    kept = Recording(path)
    assert [name_of("tiny", one) in kept for one in (first, second, third)] == [True, False, False]
    kept.add(made[1:])
    again = Recording(path)
    assert [again[name_of("tiny", one)] for one in (first, second)] == made


def test_the_table_says_in_how_many_replays_the_bound_held() -> None:
    cases = list(bound.replays({"made": outcomes("0110", "0000", "---0")}, 600, 3, (0.1,)))
    assert [case.order for case in cases] == [bound.AT_RANDOM, bound.DRIFTING]
    assert {case.laxest for case in cases} == {0.5}
    assert all(len(case.replays) == 3 for case in cases)
