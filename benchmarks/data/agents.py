"""Recorded requests of multi-agent systems as prompts for the replay (`kvshare simulate`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.data.datasets import DataFormatError, MissingDataError, lines
from benchmarks.harness.models import tokenized
from kvshare_store.simulate.prompts import Prompt

_MESSAGE = re.compile(r"(?:\A|\n\n)(system|user|assistant): ")


class Recorded(NamedTuple):
    """One request as it was recorded: all messages of the prompt as one text."""

    prompt: str
    answer: str
    at: float
    """Seconds since 1970."""
    session: str


def recorded(data: Path, trace: str = "magagent") -> list[Recorded]:
    """All requests of a trace in the order of time, over all its sessions."""
    folder = data / "agents" / trace
    paths = sorted(folder.glob("*.openai_chat.jsonl"))
    if not paths:
        raise MissingDataError("agents", folder / "SESSION.openai_chat.jsonl")
    found = [_request(path, row) for path in paths for row in lines(path)]
    return sorted(found, key=lambda request: request.at)


def _request(path: Path, row: dict[str, Any]) -> Recorded:
    try:
        return Recorded(row["input"], row["output"], row["timestamp"] / 1e6, row["session_id"])
    except KeyError as error:
        raise DataFormatError(path, f"{error} in every line") from error


def halves(requests: Sequence[Recorded]) -> dict[str, set[str]]:
    """Two sets of sessions: settings are chosen on `dev`, and `report` is told."""
    sessions = sorted({request.session for request in requests})
    return {"dev": set(sessions[::2]), "report": set(sessions[1::2])}


def messages_of(prompt: str) -> list[dict[str, str]]:
    """The messages that a recorded prompt was joined of."""
    parts = _MESSAGE.split(prompt)[1:]
    return [
        {"role": role, "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def as_recorded(requests: Sequence[Recorded]) -> list[tuple[str, str]]:
    """Prompts and answers as they are. An answer is found by no later prompt: what opened it in the
    prompt was not recorded."""
    return [(request.prompt, request.answer) for request in requests]


def as_chat(requests: Sequence[Recorded], tokenizer: Any) -> list[tuple[str, str]]:
    """Prompts and answers as a server renders them: with the chat template of a model, which
    opens the answer in the prompt. An answer ends with the model's own end of turn."""
    pairs = []
    for request in requests:
        messages = messages_of(request.prompt)
        text = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if messages
            else ""
        )
        pairs.append((text, request.answer + tokenizer.eos_token))
    return pairs


def prompts_of(
    requests: Sequence[Recorded], texts: Sequence[tuple[str, str]], folder: Path
) -> list[Prompt]:
    """Prompts for the replay, in the tokens of the model in `folder`."""
    tokens = tokenized([prompt for prompt, _ in texts], folder)
    answers = tokenized([answer for _, answer in texts], folder)
    return [
        Prompt(prompt, answer, request.at, "", request.session)
        for prompt, answer, request in zip(tokens, answers, requests, strict=True)
    ]


def write(prompts: Sequence[Prompt], path: Path) -> None:
    """What `kvshare simulate --prompts` reads: a line a prompt."""
    rows = (
        {
            "tokens": prompt.tokens.tolist(),
            "answer_tokens": prompt.answer.tolist(),
            "at": prompt.at,
            "session": prompt.session,
        }
        for prompt in prompts
    )
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
