"""What is exposed of answers, second looks and scores, compared with what happened."""

from __future__ import annotations

from collections.abc import Callable

from kvshare_store.observability.exposition import FAMILIES, exposition
from kvshare_store.quality.ladder import STALE, Terms
from kvshare_store.quality.score import SCORED_TOKENS
from kvshare_store.save.second_looks import Look
from tests.quality.streams import score
from tests.save.test_scores import ANSWER, WHOLE, answer, control, given, said
from tests.save.test_second_looks import compute, edited
from tests.support.exposition import Exposed, unread
from tests.support.oracle import Driver, prompt

COMPARED = {
    family.name
    for family in FAMILIES
    if family.name.startswith(
        ("kvshare_stored_answer", "kvshare_stored_edited", "kvshare_settled", "kvshare_second_look",
         "kvshare_scored", "kvshare_regret", "kvshare_diverged", "kvshare_quality")
    )
}  # fmt: skip
"""Families that this workload is about."""


def looked(engine: Driver) -> Look:
    look = given(engine)
    assert look is not None
    return look


def serve(engine: Driver) -> None:
    """An edited prompt whose answer is scored, and which is settled then; a control; one whose look
    is dropped, then scored, of which no exact rows come; one that the engine declines."""
    told = edited(engine)
    answer(engine, told)
    said(engine, looked(engine), WHOLE)
    compute(engine, [*told, *ANSWER])
    control(engine)
    look = looked(engine)
    assert look.control
    said(engine, look, (0.25, 0.0))
    answer(engine, edited(engine, prompt(51, 40)), greedy=False)
    said(engine, looked(engine), end="dropped")
    said(engine, looked(engine), WHOLE)
    answer(engine, edited(engine, prompt(52, 40)))
    said(engine, looked(engine), end="declined")


def learn(engine: Driver) -> None:
    """Three classes that earn `faithful`: one keeps it, one is scored no more, one turns bad. Of a
    fourth one nobody knows, and what is tried is doubted."""
    judge = engine.store.quality
    judge.reload(Terms(0.25, 0.1))
    for traffic in ("good", "silent", "bad"):
        for _ in range(400):
            judge.observe(score("faithful", traffic=traffic))
    assert judge.overview().classes["faithful"] == 3
    for _ in range(STALE):
        judge.rung("n", "silent", "faithful")
    while judge.overview().classes["faithful"] > 1:
        judge.observe(score("faithful", True, traffic="bad"))
    for _ in range(9):
        judge.observe(score("faithful", True, traffic="doubted"))


def test_answers_looks_and_scores_are_what_happened(driver: Callable[..., Driver]) -> None:
    engine = driver(second_look_control=1.0)
    serve(engine)
    learn(engine)
    tokens = {
        ("aggressive", "greedy", "replace"): SCORED_TOKENS,
        ("aggressive", "sampled", "replace"): SCORED_TOKENS,
    }
    served_in_full = ("control", "greedy", "")
    extra = engine.store.quality.overview().extra
    assert set(extra) == {"faithful", "aggressive"}
    wanted = {
        "kvshare_stored_answers_total": {(): 4},
        "kvshare_stored_answer_tokens_total": {(): 4 * len(ANSWER)},
        "kvshare_stored_edited_prompts_total": {(): 3},
        "kvshare_settled_prompts_total": {(): 1},
        "kvshare_second_looks_total": {(): 4},
        "kvshare_second_looks_dropped_total": {(): 1},
        "kvshare_second_looks_declined_total": {(): 1},
        "kvshare_second_look_controls_total": {(): 1},
        "kvshare_second_looks_waiting": {(): 1},
        "kvshare_scored_answers_total": {**dict.fromkeys(tokens, 1), served_in_full: 1},
        "kvshare_scored_tokens_total": {**tokens, served_in_full: 2},
        "kvshare_regret_nats_total": {**dict.fromkeys(tokens, 2.0), served_in_full: 0.25},
        "kvshare_diverged_answers_total": {("aggressive", "replace"): 1, ("control", ""): 1},
        "kvshare_quality_bound": {(): 0.25},
        "kvshare_quality_confidence": {(): 0.9},
        "kvshare_quality_classes": {("exact",): 5, ("faithful",): 1},
        "kvshare_quality_silent_classes": {(): 1},
        "kvshare_quality_doubted_classes": {(): 1},
        "kvshare_quality_tightened_total": {(): 1},
        "kvshare_quality_worst_extra_rate": {
            (policy, limit): rate
            for policy, limits in extra.items()
            for limit, rate in (("lower", limits.lower), ("upper", limits.upper))
            if rate
        },
    }
    stats = engine.store.stats()
    assert unread(stats) == set()
    exposed = Exposed(exposition(stats).decode())
    labels = {family.name: family.labels for family in FAMILIES}
    assert {name: exposed.by(name, *labels[name]) for name in wanted} == wanted
    assert wanted.keys() == COMPARED
