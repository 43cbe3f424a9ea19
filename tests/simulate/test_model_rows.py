"""What a token takes, read from the folder of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.errors import ConfigError
from kvshare_store.simulate.model_rows import row_bytes_of
from tests.support.commands import run

QWEN: dict[str, Any] = {
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "hidden_size": 3584,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "text_config": {
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "hidden_size": 2560,
    }
}  # fmt: skip
OLD: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}


def folder(at: Path, config: Any) -> Path:
    (at / "config.json").write_text(json.dumps(config))
    return at


@pytest.mark.parametrize(
    ("config", "nbytes"), [(QWEN, 57_344), (GEMMA, 139_264), (OLD, 2 * 2 * 4 * 16 * 2)]
)
def test_bytes_of_a_token(tmp_path: Path, config: dict[str, Any], nbytes: int) -> None:
    assert row_bytes_of(folder(tmp_path, config)) == nbytes


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 2}, "num_attention_heads"),
        ({**QWEN, "kv_lora_rank": 512}, "MLA"),
        ({**QWEN, "num_hidden_layers": "many"}, "does not say"),
        ({**QWEN, "num_attention_heads": 0}, "does not say"),
        ([], "cannot be read"),
    ],
)
def test_what_is_no_such_model(tmp_path: Path, config: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        row_bytes_of(folder(tmp_path, config))


def test_a_replay_takes_them_from_there(tmp_path: Path) -> None:
    """A budget of one prompt in the rows of a small model keeps none of a larger one's."""
    file = tmp_path / "prompts.jsonl"
    line = json.dumps({"tokens": list(range(320)), "answer_tokens": []})
    file.write_text(f"{line}\n{line}\n")
    found = {}
    for name, config in {"small": OLD, "large": GEMMA}.items():
        (tmp_path / name).mkdir()
        where = folder(tmp_path / name, config)
        options = ["--host-bytes", str(320 * 512), "--row-bytes", str(where), "--json", "-"]
        _, out, _ = run("simulate", "--prompts", str(file), "--policy", "exact", *options)
        found[name] = json.loads(out)["exact"]["to_compute"]
    assert found == {"small": 321, "large": 640}
