"""The chat example: which server it sends what, its table, its verdict."""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from rich.console import Console

from examples.chat import measured, run, table
from examples.chat.measured import ARMS, Turn
from examples.chat.run import Chat, conversations, main, written
from examples.engines.server import Streamed
from examples.prompts.histories import REWRITES

KINDS = [rewrite.name for rewrite in REWRITES]


def streamed(seconds: float, computed: int, *, text: str = "yes", reused: int = 0) -> Streamed:
    return Streamed(seconds, 1000, computed, text, {"kvshare.reused": str(reused)})


def turn(number: int, *, kind: str = "as it is", ours: float = 0.2, text: str = "yes") -> Turn:
    answers = {
        "prefix": streamed(0.4 * number, 500),
        "kvshare": streamed(ours, 100, text=text, reused=900),
    }
    return Turn(kind, 0, number, answers)


class FakeServer:
    """Answers everything and records what it was asked."""

    def __init__(self, arm: str, calls: list[tuple[str, str, int]]) -> None:
        self.arm, self.calls = arm, calls

    def ask(self, messages: list[dict[str, str]], salt: str, max_tokens: int) -> Streamed:
        self.calls.append((self.arm, salt, len(messages)))
        return streamed(0.5, 500)


class FakeStore:
    def rest(self) -> None: ...


def test_the_conversations_that_come_with_it_have_what_is_rewritten() -> None:
    """Histories with the assistant's thoughts in every turn, old tool results and a time; more than
    the tail changes."""
    spoken = written()
    assert len(spoken) == 4
    for messages in spoken:
        assert messages[0]["role"] == "system"
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert len(answers) >= 5
        assert all(text.startswith("<think>") and "</think>" in text for text in answers)
        assert sum(message["role"] == "tool" for message in messages) >= 2
        for rewrite in REWRITES[1:]:
            assert rewrite.apply(messages, 37) != messages, rewrite.name


def test_both_servers_are_sent_the_same_side_by_side() -> None:
    calls: list[tuple[str, str, int]] = []
    servers = {arm: FakeServer(arm, calls) for arm in ARMS}
    chat = Chat(servers, FakeStore(), written()[:2], 2)  # type: ignore[arg-type]
    done: list[int] = []
    turns = list(chat.serve(lambda: done.append(1)))
    assert [(one.turn, one.conversation) for one in turns[:4]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert list(dict.fromkeys(one.history for one in turns)) == KINDS
    assert len(done) == len(calls) == chat.steps == 2 * 4 * len(REWRITES)
    arms = [arm for arm, _, _ in calls]
    assert arms[:16] == ["kvshare"] * 4 + ["prefix"] * 8 + ["kvshare"] * 4
    assert len({(arm, salt) for arm, salt, _ in calls}) == 2 * len(REWRITES)


def test_rows_are_medians_by_turn_and_of_later_turns() -> None:
    first, second, third = turn(1), turn(2, text="no"), turn(3)
    assert [row.turn for row in measured.rows([first, second, third])] == ["1", "2", "3", "2+"]
    *_, later = measured.rows([first, second, third])
    assert (later.n, later.same, later.computed) == (2, 1, {"prefix": 500, "kvshare": 100})
    assert later.ratio == pytest.approx((0.25 + 1 / 6) / 2)
    assert later.total == pytest.approx(0.4 / 2.0)


def test_the_table_is_readable_in_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table.table([turn(n, kind=kind) for kind in KINDS for n in (1, 2)]))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert not any("…" in line for line in lines)
    assert lines[1].split() == [
        "history", "tokens", "plain", "KVShare", "plain", "KVShare", "times", "answer",
    ]  # fmt: skip
    assert [line.strip() for line in lines if line.strip() in KINDS] == KINDS
    later = next(line for line in lines if "2+" in line)
    assert later.split()[2:] == ["1,000", "500", "100", "800", "200", "0.25", "1", "of", "1"]


def test_the_report_has_every_turn_and_the_rows() -> None:
    made = json.loads(json.dumps(measured.report("m", [turn(1), turn(2)])))
    assert [one["turn"] for one in made["turns"]] == [1, 2]
    assert made["turns"][0]["answers"]["kvshare"]["text"] == "yes"
    assert [row["turn"] for row in made["rows"]] == ["1", "2", "2+"]


def test_nothing_reused_is_a_failure_that_says_why() -> None:
    assert measured.problems([turn(1)]) == []
    nothing = Streamed(1.0, 10, 10, "", {"kvshare.reused": "0", "kvshare.reason": "unavailable"})
    (problem,) = measured.problems([Turn("as it is", 0, 1, dict.fromkeys(ARMS, nothing))])
    assert "unavailable" in problem


def test_recorded_conversations_come_from_a_file_or_the_folder_of_data(tmp_path: Path) -> None:
    (tmp_path / "tau").mkdir()
    file = tmp_path / "tau" / "airline.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    file.write_text(f"{line}\n" * 9)
    for path in (file, tmp_path):
        assert len(conversations(Namespace(data=path, conversations=None))) == 6
        assert len(conversations(Namespace(data=path, conversations=2))) == 2
    assert len(conversations(Namespace(data=None, conversations=1))) == 1


def test_a_server_that_dies_ends_the_example_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dies = [sys.executable, "-c", "raise SystemExit('no server today')"]
    monkeypatch.setattr(run, "arguments", lambda model, store: dies)
    out = tmp_path / "report.json"
    assert main(["--model", str(tmp_path), "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Starting two servers")
    assert "the server 'prefix' has stopped" in said
    assert "no server today" in (tmp_path / "report.prefix.log").read_text()
    assert not out.exists()
