"""What `show`, `log` and `explain` say of a scored answer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvshare_store.cli import log, show, stats
from kvshare_store.readable import regret_cell, verdict_lines
from tests.cli.test_cli import NODE, REQUEST, SECOND_REQUEST, rendered


def verdict(**changes: Any) -> dict[str, Any]:
    return {
        "scored": 16, "at": time.time() - 180, "control": False, "policy": "balanced",
        "traffic": "ab/cd/insert", "greedy": True, "regret": 0.0123, "worst": 0.5, "diverged": 2,
        "floor": 0.001, "floor_answers": 12, "settled": time.time() - 120,
    } | changes  # fmt: skip


def lines(**changes: Any) -> str:
    return "\n".join(verdict_lines(verdict(**changes)))


def test_a_verdict_says_how_it_was_scored_against_which_floor_and_when_it_settled() -> None:
    assert lines().splitlines() == [
        "scored 3 min ago: 16 tokens, policy balanced",
        "regret 0.0123 nats a token, 0.5000 at most; floor 0.0010 (12 controls)",
        "differs from full compute from token 3 on",
        "settled 2 min ago",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"diverged": None}, "these tokens are those of full compute"),
        ({"greedy": False, "diverged": None}, "not greedy"),
        ({"control": True}, "served in full"),
        ({"floor": None, "floor_answers": 0}, "floor not known yet"),
    ],
)
def test_a_verdict_names_what_is_special(changes: dict[str, Any], words: str) -> None:
    assert words in lines(**changes)


def test_what_was_settled_and_not_scored_says_only_that() -> None:
    assert list(verdict_lines({"scored": 0, "settled": time.time() - 120})) == ["settled 2 min ago"]
    assert list(verdict_lines(None)) == []


def test_statistics_have_a_line_for_each_policy_and_for_controls() -> None:
    control = {"sampled": {"answers": 4, "diverged": 0, "tokens": 64, "regret": 0.0}}
    faithful = {"greedy": {"answers": 1_000, "diverged": 20, "tokens": 16_000, "regret": 80.0}}
    shown = rendered(stats.scores_table({"faithful": faithful, "control": control})).splitlines()
    assert shown[-2].split() == ["control,", "sampled", "4", "0.0000", "-"]
    assert shown[-1].split() == ["faithful,", "greedy", "1,000", "0.0050", "2.0", "%"]


def test_a_node_and_a_request_show_it() -> None:
    assert "second look" not in rendered(show.summary_table(NODE))
    assert "differs from" in rendered(show.summary_table({**NODE, "verdict": verdict()}))
    scored = REQUEST | {"verdict": verdict()}
    shown = rendered(log.requests_table([scored, SECOND_REQUEST], 200), width=200)
    assert "regret" in shown
    assert "0.012!" in shown
    assert "regret" not in rendered(log.requests_table([REQUEST], 200), width=200)
    assert regret_cell(verdict(diverged=None)) == "0.012"
