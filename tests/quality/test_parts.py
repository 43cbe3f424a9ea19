"""A class apart by how much of its prompts was computed, and by how far answers are from edits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvshare_store.nodes.node import Node
from kvshare_store.plan.contexts import Context
from kvshare_store.plan.spans import Span
from kvshare_store.quality.confidence import Tally
from kvshare_store.quality.evidence import Evidence, Learned
from kvshare_store.quality.keeping import File
from kvshare_store.quality.parts import COMPUTED, DISTANCE, Served, bucket_of, served_of
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.report import PolicyReport
from kvshare_store.quality.score import Score
from tests.quality.streams import LADDER, quality, score
from tests.quality.test_traffic import ANSWER, DONOR, QUESTION, edited, make_node


def part_score(
    computed: float | None, distance: int | None, diverged: bool = False, **of: Any
) -> Score:
    return msgspec.structs.replace(score(diverged=diverged, **of), computed=computed,
                                   distance=distance)  # fmt: skip


def policy_of(judge: Quality) -> PolicyReport:
    (known,) = judge.report()
    (found,) = known.policies
    return found


# --- what is measured -----------------------------------------------------------------------------


def test_buckets_follow_each_other_and_leave_nothing_out() -> None:
    for buckets in (COMPUTED, DISTANCE):
        assert (buckets[0].start, buckets[-1].stop) == (0, None)
        assert all(one.stop == following.start for one, following in pairwise(buckets))
    assert [bucket_of(DISTANCE, at) for at in (0, 63, 64, 255, 256, 1023, 1024, 10**9)] == [
        "0-64", "0-64", "64-256", "64-256", "256-1024", "256-1024", "1024-", "1024-"
    ]  # fmt: skip
    assert bucket_of(COMPUTED, 9.99) == "0-10"
    assert bucket_of(COMPUTED, 100.0) == "50-"
    assert bucket_of(COMPUTED, None) == bucket_of(DISTANCE, -1) == ""


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ((), 1.0),
        ((Span(0, 40, 0, 0, 0, exact=True),), 1.0),
        ((Span(0, 40, 0, 0, 0, exact=True), Span(50, 45, 50, 0, 50)), 0.25),
        ((Span(0, 20, 0, 0, 0, exact=True), Span(20, 60, 20, 0, 20, continued=True)), 0.25),
        ((Span(0, 100, 0, 0, 0, exact=True),), None),
        (None, None),
    ],
)
def test_the_share_is_of_what_is_not_exact(
    spans: tuple[Span, ...] | None, share: float | None
) -> None:
    node = make_node(edited(40, 2, 2))
    found = served_of(node, 100, spans, None).computed
    assert found == (share if share is None else pytest.approx(share))


def test_the_distance_begins_where_the_last_edit_ends() -> None:
    donor = make_node(DONOR + QUESTION)
    prompt = edited(50, 2, 3) + QUESTION
    for tokens in (prompt, prompt + ANSWER):
        served = served_of(make_node(tokens, donor), len(prompt), (), None)
        assert served.edit == 53
        assert served.distance(len(prompt)) == len(prompt) - 53
    twice = [*edited(20, 1, 1)[:70], 9500, *DONOR[70:]]
    assert served_of(make_node(twice, donor), len(twice), (), Served(edit=3)).edit == 71
    assert served.distance(50) is None, "the edit is behind that"


def test_a_prompt_that_goes_on_has_the_edit_that_it_goes_on_from() -> None:
    first = make_node(edited(50, 2, 2) + QUESTION, make_node(DONOR))
    before = served_of(first, first.length, (), None)
    second = make_node(first.tokens.tolist() + ANSWER, first)
    after = served_of(second, second.length, (), before)
    third = make_node(second.tokens.tolist() + QUESTION[::-1], second)
    assert served_of(third, third.length, (), after).edit == before.edit == 52
    early = make_node(first.tokens.tolist()[:30] + ANSWER, first)
    assert served_of(early, early.length, (), before).edit is None, "it stood behind that"
    assert served_of(third, third.length, (), None).edit is None, "nobody knows it any more"
    known = msgspec.structs.replace(third, contexts=(Context(44, b"d" * 16, 60),))
    assert served_of(known, known.length, (), None).edit == 44


# --- what is reported -----------------------------------------------------------------------------


def test_each_part_has_its_counts_and_limits() -> None:
    judge = quality()
    for at in range(400):
        near = at % 4 == 0
        regrets = (0.0, 1.5 if near and at % 8 == 0 else 0.0)
        one = part_score(0.05 if near else 0.3, 10 if near else 2000)
        judge.observe(msgspec.structs.replace(one, regrets=regrets))
        judge.observe(part_score(0.3, None, greedy=False))
        judge.observe(score(control=True))
    known = policy_of(judge)
    assert [(one.start, one.stop, one.greedy, one.sampled) for one in known.computed] == [
        (0, 10, 100, 0), (25, 50, 300, 400)
    ]  # fmt: skip
    near, far = known.distance
    assert (near.start, near.stop, near.greedy) == (0, 64, 100)
    assert (far.start, far.stop, far.greedy, far.diverged.mean) == (1024, None, 300, 0.0)
    assert near.diverged.mean == 0.5
    assert near.diverged.low < 0.5 < near.diverged.high
    assert near.extra.low > far.extra.high, "the class is good far from its edits only"
    assert near.regret.mean == pytest.approx(0.375)
    assert near.regret.low < 0.375 < near.regret.high
    assert known.greedy == sum(one.greedy for one in known.distance)


def test_what_is_not_known_is_in_no_part() -> None:
    judge = quality()
    judge.observe(score())
    judge.observe(part_score(0.3, None))
    known = policy_of(judge)
    assert known.greedy == 2
    assert [one.greedy for one in known.computed] == [1]
    assert known.distance == ()


def test_parts_split_no_evidence_of_the_ladder() -> None:
    """The same scores with and without: the same decision after each."""
    random, apart, whole = np.random.default_rng(1), quality(0.05), quality(0.05)
    for at in range(600):
        one = score(LADDER[1 + at % 2], bool(random.random() < 0.02))
        parts = {"computed": float(random.random()), "distance": int(random.integers(3000))}
        apart.observe(msgspec.structs.replace(one, **parts))
        whole.observe(one)
        assert apart.would("n", "t", LADDER[-1]) == whole.would("n", "t", LADDER[-1])


def test_a_tenants_parts_are_its_own() -> None:
    judge = quality()
    judge.observe(part_score(0.3, 10, namespace="mine"))
    judge.observe(part_score(0.05, 2000, namespace="theirs"))
    found = {one.namespace: one.policies[0] for one in judge.report()}
    assert [one.start for one in found["mine"].distance] == [0]
    assert [one.start for one in found["theirs"].distance] == [1024]


def test_parts_are_bounded_whatever_is_scored() -> None:
    evidence = Evidence()
    for share, distance in zip(np.linspace(-1, 3, 500), np.geomspace(1, 1e9, 500), strict=True):
        evidence.add(part_score(float(share), int(distance) - 50))
    assert set(evidence.computed) == {one.name for one in COMPUTED}
    assert set(evidence.distance) == {one.name for one in DISTANCE}


# --- restarts and releases ------------------------------------------------------------------------


def taught(file: File) -> Quality:
    judge = quality(file=file)
    for at in range(50):
        judge.observe(part_score(at / 50, at * 40, at == 7))
    judge.close()
    return judge


def test_a_restart_keeps_them(tmp_path: Path) -> None:
    judge = taught(File(tmp_path / "quality"))
    again = quality(file=File(tmp_path / "quality"))
    assert again.report() == judge.report()
    assert len(policy_of(again).distance) == 4


class OlderEvidence(msgspec.Struct):
    """As the release before wrote it."""

    diverged: Tally = msgspec.field(default_factory=Tally)
    regret: Tally = msgspec.field(default_factory=Tally)
    sampled: Tally = msgspec.field(default_factory=Tally)
    doubt: float = 0.0


class OlderLearned(msgspec.Struct):
    policies: dict[str, OlderEvidence] = msgspec.field(default_factory=dict)
    epoch: int = 1
    unscored: int = 0
    scored: float = 0.0


def test_the_release_before_reads_it_and_is_read() -> None:
    learned = Learned()
    for _ in range(9):
        learned.of("faithful").add(part_score(0.3, 10))
    theirs = msgspec.msgpack.decode(msgspec.msgpack.encode(learned), type=OlderLearned)
    assert theirs.policies["faithful"].diverged.count == 9
    ours = msgspec.msgpack.decode(msgspec.msgpack.encode(theirs), type=Learned)
    assert ours.of("faithful").diverged == learned.of("faithful").diverged
    assert ours.of("faithful").computed == {}
    ours.of("faithful").add(part_score(0.3, 10))
    assert ours.of("faithful").diverged.count == 10


def test_parts_of_other_bounds_are_left_out(tmp_path: Path) -> None:
    file = File(tmp_path / "quality")
    taught(file)
    kept = file.read()
    assert kept is not None
    parts = kept.classes["n"]["t"].of("faithful").distance
    parts["0-7"] = parts.pop("0-64")
    file.write(file.encode(kept))
    again = policy_of(quality(file=file))
    assert [one.start for one in again.distance] == [64, 256, 1024]
    assert again.greedy == 50


def test_evidence_that_begins_anew_has_new_parts() -> None:
    judge = quality(0.02)
    for _ in range(400):
        judge.observe(part_score(0.3, 10))
    while policy_epoch(judge) == 1:
        judge.observe(part_score(0.3, 10, diverged=True))
    judge.observe(part_score(0.3, 10))
    assert [one.greedy for one in policy_of(judge).distance] == [1]


def policy_epoch(judge: Quality) -> int:
    return judge.report()[0].epoch


def test_a_node_without_a_parent_has_no_edit() -> None:
    node: Node = make_node(DONOR)
    assert served_of(node, 100, None, None) == Served()
