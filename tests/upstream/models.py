"""A Hugging Face cache for vLLM's tests: configurations of tiny models, and a tokenizer.

The tests name models of the hub but never run one: they read configurations and tokenise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_REVISION = "0" * 40
_IMAGE = 49152
"""The first id after the tokenizer's own vocabulary."""

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 2,
    "dtype": "float16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50272,
}
_QWEN2 = _LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
_QWEN3 = _LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 16,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
}
_LLAVA: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "dtype": "float16",
    "ignore_index": -100,
    "image_token_index": _IMAGE,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": _LLAMA | {"max_position_embeddings": 4096},
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 50272,
}
_MODELS = {
    "Qwen/Qwen1.5-7B": _QWEN2,
    "Qwen/Qwen3-0.6B": _QWEN3,
    "facebook/opt-125m": _LLAMA,
    "facebook/opt-350m": _LLAMA,
    "llava-hf/llava-1.5-7b-hf": _LLAVA,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA | {"max_position_embeddings": 131072},
}
_IMAGE_PROCESSOR = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 336},
}
_PROCESSOR = {
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": 14,
    "processor_class": "LlavaProcessor",
    "vision_feature_select_strategy": "default",
}


def make_models(cache: Path, tokenizer: Path) -> None:
    """Write `cache` as a Hugging Face home; `tokenizer` is the folder of any model."""
    for name, config in _MODELS.items():
        folder = cache / "hub" / ("models--" + name.replace("/", "--"))
        snapshot = folder / "snapshots" / _REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(_REVISION)
        _write(snapshot / "config.json", config)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, snapshot / file)
        if config is _LLAVA:
            _add_image_token(snapshot / "tokenizer.json")
            _write(snapshot / "preprocessor_config.json", _IMAGE_PROCESSOR)
            _write(snapshot / "processor_config.json", _PROCESSOR)


def _add_image_token(file: Path) -> None:
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": _IMAGE, "content": "<image>", "special": True, **flags}
    tokenizer["added_tokens"].append(token)
    _write(file, tokenizer)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1))
