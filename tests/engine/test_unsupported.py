"""Models that KVShare does not serve run as without it, and the log says why."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Engine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

WINDOW = 64
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
}


def config_of(architecture: str) -> Any:
    """The configuration of a tiny model in which some layers attend to the last tokens only, or
    keep a state instead of rows."""
    from transformers import Gemma3TextConfig, GptOssConfig, Lfm2Config, MistralConfig

    if architecture == "MistralForCausalLM":
        return MistralConfig(**TINY, num_hidden_layers=2)
    if architecture == "Gemma3ForCausalLM":
        layers = ["sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(**TINY, num_hidden_layers=4, layer_types=layers)
    if architecture == "Lfm2ForCausalLM":
        return Lfm2Config(
            **{**TINY, "sliding_window": None}, num_hidden_layers=2, conv_dim=64,
            layer_types=["conv", "full_attention"], block_dim=64, block_ff_dim=64,
            block_multiple_of=32,
        )  # fmt: skip
    layers = ["sliding_attention", "full_attention"]
    return GptOssConfig(
        **TINY, num_hidden_layers=2, layer_types=layers, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip


def model_in(folder: Path, architecture: str) -> Path:
    folder.mkdir()
    described = config_of(architecture).to_dict() | {"architectures": [architecture]}
    described.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(described, default=str))
    return folder


@pytest.mark.parametrize(
    ("architecture", "groups", "reason"),
    [
        ("MistralForCausalLM", 1, "sliding_window"),
        ("Gemma3ForCausalLM", 2, "sliding_window"),
        ("GptOssForCausalLM", 2, "sliding_window"),
        ("Lfm2ForCausalLM", 2, "mamba_or_hybrid"),
    ],
)
def test_an_unsupported_model_is_served_without_reuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str, groups: int, reason: str
) -> None:
    """Layers with a window or a state keep blocks of their own: vLLM's hybrid memory manager stays
    on. vLLM switches it off for connectors that do not declare support for it."""
    with caplog.at_level(logging.WARNING, "kvshare"):
        engine = Engine(
            tmp_path / "home",
            model=str(model_in(tmp_path / "model", architecture)),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=256,
            kv_cache_memory_bytes=16 << 20,
            enable_prefix_caching=True,
        )
    try:
        assert not engine.scheduler.scheduler_config.disable_hybrid_kv_cache_manager
        assert len(engine.scheduler.kv_cache_config.kv_cache_groups) == groups
        assert engine.planning is None
        prompt = list(range(1, 101))
        name = engine.add(prompt, detokenize=False)
        first = engine.drain()[name][0]
        again = engine.add(prompt, detokenize=False)
        second = engine.drain()[again][0]
        assert len(first.tokens) == 4
        assert second.tokens == first.tokens
        assert second.cached >= 64  # vLLM's own prefix cache works as ever
        assert first.said == {"reused": 0, "reason": reason}
        assert not engine.scheduler.requests
    finally:
        engine.close()
    said = [record.getMessage() for record in caplog.records if record.name == "kvshare"]
    assert said == [f"kvshare: this model is served without reuse: {reason}"]
    assert not (tmp_path / "home" / "blocks").exists()
