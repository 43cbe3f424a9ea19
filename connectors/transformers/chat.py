"""Messages as the text of a prompt, through a model's chat template, as vLLM makes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvshare_store.errors import ConfigError, UnsupportedError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]
"""Messages, and tools that the template shows, as one text that ends where the answer begins."""


def renderer(folder: Path) -> Render:
    """By the chat template in a model's folder. `ConfigError` if the folder has none;
    `UnsupportedError` if transformers is not installed."""
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds; optional
    except ImportError as error:
        raise UnsupportedError(
            "messages need a library: pip install 'kvshare-store[transformers]'"
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.get_chat_template()
    except Exception as error:  # whatever a model's files make the library raise
        raise ConfigError(f"{folder} has no chat template: {error}") from error

    def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [_as_templates_want(message) for message in messages],
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever a template raises, and messages of another form
            raise ConfigError(f"the chat template does not take its messages: {error}") from error
        return text

    return render


def _as_templates_want(message: Message) -> dict[str, Any]:
    """Content as one text, and the arguments of calls as objects: the API has them otherwise."""
    made = {**message, "content": _text(message.get("content"))}
    calls = made.pop("tool_calls", None)
    if calls:
        made["tool_calls"] = [_call(call) for call in calls]
    return made


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not all(part["type"] == "text" for part in content):
        raise ConfigError("they hold more than text")
    return "\n".join(part["text"] for part in content)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}
