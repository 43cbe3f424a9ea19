"""Conversations go to every arm, and are compared with prefix caching and full compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.chat_histories import as_tokens
from benchmarks.harness.engines import Timed, in_turn
from benchmarks.harness.result import Options
from benchmarks.harness.turns import Turn
from benchmarks.peers import conversations, environment
from examples.prompts.histories import REWRITES

ARMS = [*conversations.ARMS, "lmcache", "semblend"]
SECONDS = {"full": 2.0, "prefix": 1.0, "prefix again": 1.1, "kvshare": 0.5, "lmcache": 1.2,
           "semblend": 1.3}  # fmt: skip
KINDS = [*(rewrite.name for rewrite in REWRITES), conversations._OWN]
ASKED = [(1, [1, 2]), (2, [1, 2, 5]), (3, [1, 2, 5, 6])]


class FakeEngine:
    """Answers in its arm's seconds and records how it was asked."""

    def __init__(self, arm: str, calls: list[tuple[str, str]]) -> None:
        self.arm, self.calls = arm, calls

    def ask(self, tokens: list[int], salt: str, *, max_tokens: int) -> Timed:
        self.calls.append((self.arm, salt))
        report = {"kvshare.recomputed": 1} if self.arm == "kvshare" else {}
        answer = [7, 8] if self.arm == "kvshare" else [7, 9]
        return Timed(SECONDS[self.arm], len(tokens), 0, answer, "", {}, report)

    def settle(self) -> None:
        self.calls.append((self.arm, "settled"))


class FakeHome:
    def flush(self) -> None: ...

    def wait_idle(self) -> None: ...


def serve(calls: list[tuple[str, str]]) -> list[Turn]:
    engines = {arm: FakeEngine(arm, calls) for arm in ARMS}
    return [
        turn
        for kind in KINDS
        for turn in conversations.serve_turns(engines, FakeHome(), kind, ASKED, "salt", 0)  # type: ignore[arg-type]
    ]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "_STORED_S", 0.0)


def test_an_arm_serves_all_turns_before_the_next_one_begins() -> None:
    calls: list[tuple[str, str]] = []
    serve(calls)
    first = calls[: len(calls) // len(KINDS)]
    asked = [arm for arm, salt in first if salt != "settled"]
    assert asked == [arm for arm in in_turn(ARMS, 0) for _ in ASKED]
    assert first[asked.index("kvshare") + len(ASKED)] == ("kvshare", "settled")
    assert {arm for arm, salt in calls if not salt} == {"semblend"}


def test_the_table_compares_later_turns() -> None:
    made = conversations.result_of(serve([]), Options(data=Path(), model="model"), "model")
    assert len(made.rows) == len(KINDS) * len(ARMS)
    rows = {(row[0], row[1]): dict(zip(made.columns, row, strict=True)) for row in made.rows}
    ours, floor = rows["as it is", "kvshare"], rows["as it is", "prefix"]
    assert (ours["n"], ours["ms"]) == (2, 500)
    assert (ours["times prefix caching"], ours["sum"]) == ("0.50", "0.50")
    assert (ours["computed"], floor["computed"]) == (2, 7)
    assert (ours["first token"], ours["answer"]) == ("2 of 2", "0 of 2")
    assert (floor["first token"], floor["answer"]) == ("2 of 2", "2 of 2")
    assert [reached for _, _, reached in made.targets] == [True, False, True]
    conversations.draw(made)


def test_without_the_others_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "ENVIRONMENT", tmp_path)
    with conversations.others() as arms:
        assert arms == {}
    assert "make bench-setup" in capsys.readouterr().out
    notes = conversations.notes_of(serve([]), list(conversations.ARMS))
    assert notes[-1] == "not installed, so not measured: lmcache, semblend"


def test_the_model_answers_turn_after_turn() -> None:
    """Each answer is added to its own arm's history."""

    class Echo:
        def ask(self, tokens: list[int], salt: str, *, max_tokens: int) -> Timed:
            return Timed(1.0, len(tokens), 0, [1], f"answer to {len(tokens)}", {})

    def letters(text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    spoken = [
        {"role": role, "content": "word"}
        for role in ("system", "user", "assistant", "user", "assistant", "user", "assistant")
    ]
    own = conversations.answered(spoken, Echo(), letters, 2)  # type: ignore[arg-type]
    first, second, third = (own[at]["content"] for at in (2, 4, 6))
    assert first == f"answer to {len(as_tokens(spoken[:2], letters))}"
    assert second == f"answer to {len(as_tokens(own[:4], letters))}"
    assert third == "word"
