"""A model that KVShare does not serve is served plainly, and the log says why."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.engine.harness import Engine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

WINDOW = 64


@pytest.fixture
def sliding_window(tmp_path: Path) -> Path:
    """A tiny model with random weights that attends to its last tokens only."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=WINDOW,
    )
    folder = tmp_path / "model"
    folder.mkdir()
    described = config.to_dict() | {"architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(described, default=str))
    return folder


def test_an_unsupported_model_is_served_without_reuse(
    sliding_window: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvshare"):
        engine = Engine(
            tmp_path / "home",
            model=str(sliding_window),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=256,
            kv_cache_memory_bytes=16 << 20,
        )
    try:
        assert engine.planning is None
        prompt = list(range(1, 101))
        name = engine.add(prompt, detokenize=False)
        again = engine.add(prompt, detokenize=False)
        answers = engine.drain()
        assert len(answers[name][0].tokens) == 4
        assert answers[again][0].agrees(answers[name][0])
        assert not engine.scheduler.requests
    finally:
        engine.close()
    said = [record.getMessage() for record in caplog.records if record.name == "kvshare"]
    assert said == ["kvshare: this model is served without reuse: sliding_window"]
    assert not (tmp_path / "home" / "blocks").exists()
