"""Messages become the text that vLLM makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kvshare_connectors.transformers.chat import renderer

from kvshare_store.errors import ConfigError
from tests.support.chat_model import chat_model


def test_messages_end_where_the_answer_begins(tmp_path: Path) -> None:
    render = renderer(chat_model(tmp_path))
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert render(said, None) == "<system>s<user>u<bot>"
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert render(said, tools).startswith("[weather]<system>")


def test_messages_may_be_as_the_api_takes_them(tmp_path: Path) -> None:
    """Content in parts or none at all, arguments of calls as JSON in a string."""
    render = renderer(chat_model(tmp_path))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([{"role": "user", "content": parts}], None) == "<user>a\nb<bot>"
    function: dict[str, Any] = {"name": "weather", "arguments": '{"city": "Bern"}'}
    calls = [{"type": "function", "function": function}]
    asked = [{"role": "assistant", "content": None, "tool_calls": calls}]
    assert render(asked, None) == "<assistant>(Bern)<bot>"
    assert calls[0]["function"] == function, "what was read stays as it is"
    assert render([{"role": "assistant", "content": "x", "tool_calls": []}], []) == (
        "<assistant>x<bot>"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": "u", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "u", "tool_calls": [{"function": {"arguments": "{"}}]}],
    ],
)
def test_what_cannot_be_rendered_is_an_error(tmp_path: Path, messages: list[Any]) -> None:
    with pytest.raises(ConfigError):
        renderer(chat_model(tmp_path))(messages, None)


def test_a_template_that_refuses_is_an_error(tmp_path: Path) -> None:
    render = renderer(chat_model(tmp_path, "{{ raise_exception('only one system message') }}"))
    with pytest.raises(ConfigError, match="only one system message"):
        render([{"role": "user", "content": "u"}], None)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_template_is_an_error(tmp_path: Path, made: bool) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        renderer(chat_model(tmp_path, "") if made else tmp_path / "nowhere")
