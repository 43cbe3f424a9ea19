"""What each rewrite does to a history, and in which order conversations are sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.prompts.histories import (
    REWRITES,
    Message,
    Rewrite,
    recorded,
    requests,
    turns,
    with_thoughts,
)

RESULT = "a long result " * 40
RULES = "The current time is 2024-05-15 15:00:00 EST.\n- Never guess.\n- Ask first.\n- Be short."
RECORDED = [
    {"role": "system", "content": RULES},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "look", "arguments": "{}"}, "id": "1"}]},
    {"role": "tool", "content": RESULT, "name": "look"},
    {"role": "assistant", "content": "Once more."},
    {"role": "tool", "content": RESULT, "name": "look"},
    {"role": "assistant", "content": "Found it."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Done."},
]  # fmt: skip


@pytest.fixture
def conversation(tmp_path: Path) -> list[Message]:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": RECORDED}) + "\n")
    (only,) = recorded(path)
    return only


def texts(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages]


def rewrite(name: str) -> Rewrite:
    return next(one for one in REWRITES if one.name == name)


def changed(name: str, messages: list[Message], second: int = 0) -> list[int]:
    """Positions of messages that a rewrite changes but does not delete."""
    after = rewrite(name).apply(messages, second)
    pairs = zip(texts(messages), texts(after), strict=True)
    return [at for at, (old, new) in enumerate(pairs) if old != new]


def test_calls_of_tools_become_text(conversation: list[Message]) -> None:
    assert conversation[2] == {
        "role": "assistant",
        "content": '<tool_call>{"arguments": "{}", "name": "look"}</tool_call>',
    }


def test_a_line_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"messages": RECORDED}) + '\n{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"two\.jsonl, line 2: expected"):
        list(recorded(path))


def test_every_answer_has_the_history_before_it(conversation: list[Message]) -> None:
    assert [len(history) for history in turns(conversation)] == [2, 4, 6, 8]


def test_as_it_is_changes_nothing(conversation: list[Message]) -> None:
    assert rewrite("as it is").apply(conversation, 9) == conversation


def test_the_date_is_never_the_same_twice(conversation: list[Message]) -> None:
    dated = rewrite("a date in the system prompt").apply
    assert changed("a date in the system prompt", conversation, 37) == [0]
    assert "2024-05-15 15:00:37 EST" in dated(conversation, 37)[0]["content"]
    assert "2024-05-15 16:01:01 EST" in dated(conversation, 3661)[0]["content"]
    timeless = [{"role": "system", "content": "Be kind."}, *conversation[1:]]
    assert dated(timeless, 37)[0]["content"] == "It is 15:00:37.\n\nBe kind."


def test_old_tool_results_are_cut_short(conversation: list[Message]) -> None:
    assert changed("old tool results truncated", conversation) == [3]
    after = rewrite("old tool results truncated").apply(conversation, 0)
    assert RESULT.startswith(after[3]["content"])
    assert len(after[3]["content"]) == 120


def test_only_the_latest_turn_keeps_its_thoughts(conversation: list[Message]) -> None:
    after = rewrite("thoughts stripped").apply(conversation, 0)
    assert [at for at, text in enumerate(texts(after)) if "<think>" in text] == [8]
    assert texts(after)[:8] == texts(conversation)[:8]
    assert texts(after)[8].endswith("</think>\n\nDone.")


def test_made_thoughts_depend_on_nothing_behind_them(conversation: list[Message]) -> None:
    for at in range(2, len(conversation) + 1):
        assert with_thoughts(conversation)[:at] == with_thoughts(conversation[:at])


def test_a_turn_that_has_thoughts_keeps_them() -> None:
    spoken = [
        {"role": "system", "content": RULES},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."},
    ]
    assert with_thoughts(spoken) == spoken


def test_compaction_keeps_the_tail_and_no_result_without_its_call(
    conversation: list[Message],
) -> None:
    compacted = rewrite("compaction").apply
    assert compacted(conversation[:6], 0) == conversation[:6]
    assert compacted(conversation[:8], 0) == [conversation[0], *conversation[4:8]]
    assert compacted(conversation, 0) == [conversation[0], *conversation[4:]]


def test_conversations_are_sent_side_by_side(conversation: list[Message]) -> None:
    other = conversation[:5]
    sent = list(requests([conversation, other], rewrite("a date in the system prompt"), 3))
    assert [(one.conversation, one.turn) for one in sent] == [
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 2),
        (0, 3),
    ]
    assert len({one.messages[0]["content"] for one in sent}) == len(sent)
