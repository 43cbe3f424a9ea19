"""A model's folder with a tokenizer of one token per byte and a chat template, and no weights."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.page import byte_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}({{ call.function.arguments.city }}){% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def chat_model(folder: Path, template: str = TEMPLATE) -> Path:
    """Write it; without a template if that is empty."""
    byte_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder
