"""What is served and what is declined, for configurations that vLLM itself has built.

No weights and no tokenizer: every model family is a `config.json` with small numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvshare_store.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing vLLM warns, and here warnings are errors
    pytest.importorskip("vllm.model_executor.layers.rotary_embedding")

import vllm.model_executor.models.registry as registry
from kvshare_connectors.vllm import capability
from kvshare_connectors.vllm.capability import decline_reason, model_rope
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import get_rope

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:::(vllm|torch|transformers)")]

POSITIONS = 512
HEAD_DIM = 16
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200_000,
    "max_position_embeddings": POSITIONS,
}
GPT2_SIZES = {"n_embd": 64, "n_head": 4, "n_layer": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

Build = Callable[..., VllmConfig]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """vLLM's configuration of a model that consists of a config.json only."""
    # vLLM looks at a model's class in a new process, which takes ten seconds a class.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())

    def make(
        architecture: str, model_type: str, cache: dict[str, Any], **fields: Any
    ) -> VllmConfig:
        config = {"architectures": [architecture], "model_type": model_type, **SIZES, **fields}
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            model=str(tmp_path), tokenizer=str(tmp_path), skip_tokenizer_init=True, dtype="float32"
        )
        return VllmConfig(model_config=model, cache_config=CacheConfig(block_size=32, **cache))

    return make


def llama(build: Build, **fields: Any) -> VllmConfig:
    return build("LlamaForCausalLM", "llama", {}, **fields)


# --- families -------------------------------------------------------------------------------------

SERVED = [
    ("LlamaForCausalLM", "llama", {}),
    ("LlamaForCausalLM", "llama", {"rope_scaling": LLAMA3}),
    ("LlamaForCausalLM", "llama", {"rope_scaling": YARN}),
    ("LlamaForCausalLM", "llama", {"rope_scaling": LINEAR}),
    ("LlamaForCausalLM", "llama", {"rope_parameters": {**YARN, "rope_theta": 5e5}}),
    ("MistralForCausalLM", "mistral", {"sliding_window": None}),
    ("MixtralForCausalLM", "mixtral", {"sliding_window": None}),
    ("Qwen2ForCausalLM", "qwen2", {"sliding_window": 128, "use_sliding_window": False}),
    ("Qwen2ForCausalLM", "qwen2", {"rope_scaling": YARN}),
    ("Qwen2MoeForCausalLM", "qwen2_moe", {}),
    ("Qwen3ForCausalLM", "qwen3", {"head_dim": 32}),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {}),
    ("GemmaForCausalLM", "gemma", {"head_dim": 32}),
    ("Phi3ForCausalLM", "phi3", {}),
    ("CohereForCausalLM", "cohere", {}),
    ("GraniteForCausalLM", "granite", {}),
    ("StableLmForCausalLM", "stablelm", {}),
    ("Glm4ForCausalLM", "glm4", {"head_dim": 32}),
    ("NemotronForCausalLM", "nemotron", {}),
    ("OlmoeForCausalLM", "olmoe", {}),
    ("FalconForCausalLM", "falcon", {"alibi": False}),
]
MLA = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
DECLINED = [
    # window, chunks
    ("sliding_window", "MistralForCausalLM", "mistral", {"sliding_window": 128}),
    (
        "sliding_window",
        "Qwen2ForCausalLM",
        "qwen2",
        {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1},
    ),
    ("sliding_window", "Gemma2ForCausalLM", "gemma2", {}),
    ("sliding_window", "Gemma3ForCausalLM", "gemma3_text", {}),
    ("sliding_window", "Cohere2ForCausalLM", "cohere2", {}),
    ("sliding_window", "GptOssForCausalLM", "gpt_oss", {"rope_scaling": YARN}),
    ("sliding_window", "LlamaForCausalLM", "llama", {"sliding_window": 64}),
    ("chunked_attention", "Llama4ForCausalLM", "llama4_text", {"attention_chunk_size": 128}),
    (
        "attention_unknown",
        "LlamaForCausalLM",
        "llama",
        {"layer_types": ["compressed_sparse_attention"] * 2},
    ),
    # no softmax attention over K and V, or not only such
    ("mamba_or_hybrid", "MambaForCausalLM", "mamba", {}),
    ("mamba_or_hybrid", "JambaForCausalLM", "jamba", {"use_mamba_kernels": False}),
    ("mla", "DeepseekV2ForCausalLM", "deepseek_v2", MLA),
    ("encoder_decoder", "WhisperForConditionalGeneration", "whisper", {"d_model": 64}),
    ("pooling_model", "BertModel", "bert", {}),
    ("pooling_model", "Qwen2ForSequenceClassification", "qwen2", {}),
    ("bidirectional", "LlamaForCausalLM", "llama", {"is_causal": False}),
    ("kv_sharing", "LlamaForCausalLM", "llama", {"num_kv_shared_layers": 1}),
    # positions
    ("alibi", "BloomForCausalLM", "bloom", {"n_head": 4, "n_layer": 2}),
    ("alibi", "FalconForCausalLM", "falcon", {"alibi": True}),
    ("rope_missing", "GPT2LMHeadModel", "gpt2", GPT2_SIZES),
    ("rope_missing", "GPTJForCausalLM", "gptj", {**GPT2_SIZES, "rotary_dim": 8}),
    ("rope_missing", "OPTForCausalLM", "opt", {"ffn_dim": 64}),
    (
        "rope_longrope",
        "Phi3ForCausalLM",
        "phi3",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 256},
    ),
    (
        "rope_dynamic",
        "LlamaForCausalLM",
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    (
        "rope_mrope",
        "LlamaForCausalLM",
        "llama",
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
    ),
    (
        "rope_dual_chunk",
        "Qwen2ForCausalLM",
        "qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 16}},
    ),
    (
        "rope_fope",
        "LlamaForCausalLM",
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "use_fope": True}},
    ),
    ("nope_layers", "SmolLM3ForCausalLM", "smollm3", {}),
    ("nope_layers", "GraniteForCausalLM", "granite", {"layer_rope_theta": [1e4, 0]}),
    # model code that we have not reviewed
    ("transformers_backend", "GPTNeoXForCausalLM", "gpt_neox", {}),
    ("architecture_unlisted", "DbrxForCausalLM", "llama", {}),
]


@pytest.mark.parametrize(("architecture", "model_type", "fields"), SERVED)
def test_served(build: Build, architecture: str, model_type: str, fields: dict[str, Any]) -> None:
    assert decline_reason(build(architecture, model_type, {}, **fields)) is None


@pytest.mark.parametrize(("reason", "architecture", "model_type", "fields"), DECLINED)
def test_declined(
    build: Build, reason: str, architecture: str, model_type: str, fields: dict[str, Any]
) -> None:
    assert decline_reason(build(architecture, model_type, {}, **fields)) == reason


def test_every_architecture_listed_is_one_of_vllm() -> None:
    assert set(registry.ModelRegistry.get_supported_archs()) >= capability.ARCHITECTURES


# --- the same model, run in another way -----------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("tensor_parallel", {"parallel_config.tensor_parallel_size": 2}),
        ("pipeline_parallel", {"parallel_config.pipeline_parallel_size": 2}),
        ("context_parallel", {"parallel_config.decode_context_parallel_size": 2}),
        ("context_parallel", {"parallel_config.prefill_context_parallel_size": 2}),
        ("ubatching", {"parallel_config.enable_dbo": True}),
        ("speculative_decoding", {"speculative_config": object()}),
        ("kv_cache_dtype_fp8", {"cache_config.cache_dtype": "fp8"}),
        ("kv_cache_dtype_fp8", {"cache_config.cache_dtype": "fp8_e5m2"}),
        ("kv_cache_dtype_other", {"cache_config.cache_dtype": "nvfp4"}),
        ("kv_cache_dtype_other", {"cache_config.cache_dtype": "bfloat16"}),
        ("kv_sharing", {"cache_config.kv_sharing_fast_prefill": True}),
        ("sliding_window", {"cache_config.sliding_window": 64}),
        ("pooling_model", {"model_config.runner_type": "pooling"}),
        ("multimodal_model", {"model_config.multimodal_config": object()}),
        ("rope_missing", {"model_config.hf_text_config.rope_parameters": None}),
        ("rope_unknown", {"model_config.hf_text_config.rope_parameters": {"rope_theta": 1e4}}),
        (
            "rope_unknown",
            {"model_config.hf_text_config.rope_parameters": {"rope_type": "proportional"}},
        ),
        (
            "rope_unknown",
            {
                "model_config.hf_text_config.rope_parameters": {
                    "rope_type": "linear",
                    "factor": [2.0, 4.0],
                }
            },
        ),
        (
            "rope_per_layer",
            {
                "model_config.hf_text_config.rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4}
                }
            },
        ),
    ],
)
def test_declined_for_how_it_is_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, reason: str, changes: dict[str, Any]
) -> None:
    config = llama(build)
    assert decline_reason(config) is None
    for path, value in changes.items():
        *owners, field = path.split(".")
        owner: Any = config
        for name in owners:
            owner = getattr(owner, name)
        # Set directly: vLLM would ask for the devices that some of these need.
        monkeypatch.setitem(vars(owner), field, value)
    assert decline_reason(config) == reason


def test_the_models_own_dtype_may_be_named(build: Build) -> None:
    config = llama(build)
    config.cache_config.cache_dtype = "float32"
    assert decline_reason(config) is None


def test_a_window_that_was_switched_off_is_no_window(tmp_path: Path, build: Build) -> None:
    build("MistralForCausalLM", "mistral", {}, sliding_window=128)
    model = ModelConfig(
        model=str(tmp_path),
        tokenizer=str(tmp_path),
        skip_tokenizer_init=True,
        disable_sliding_window=True,
    )
    assert decline_reason(VllmConfig(model_config=model)) is None


def test_asking_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, kvshare_connectors.vllm.capability\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- the table of the loaded model ----------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The rotary modules of this process: none yet."""
    modules: dict[Any, Any] = {}
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", modules)
    return modules


def rotary(config: VllmConfig, *, neox: bool = True, **parameters: Any) -> Any:
    """What a model's attention layer builds."""
    dtype = config.model_config.dtype
    with set_current_vllm_config(config):
        return get_rope(HEAD_DIM, POSITIONS, neox, {"rope_theta": 1e4, **parameters}, dtype)


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaling", [{}, LINEAR, LLAMA3, YARN], ids=lambda s: s.get("rope_type"))
def test_moved_k_is_what_the_model_would_compute(
    build: Build,
    made: dict[Any, Any],
    scaling: dict[str, Any],
    dtype: torch.dtype,
    partial: float,
    neox: bool,
) -> None:
    config = llama(build)
    config.model_config.dtype = dtype
    module = rotary(config, neox=neox, partial_rotary_factor=partial, **scaling)
    plain = torch.randn(1, 30, 2, HEAD_DIM).to(dtype)
    source, target = torch.randint(0, POSITIONS, (30,)), torch.randint(0, POSITIONS, (30,))

    def computed(positions: torch.Tensor) -> torch.Tensor:
        keys = plain.reshape(30, -1)
        return module.forward_native(positions, keys.clone(), keys.clone())[1].view(plain.shape)

    keys = computed(source)
    model_rope(config).move(keys, source, target)

    expected = computed(target)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert (keys.float() - expected.float()).abs().max() < tolerance
    rotary_dim = int(HEAD_DIM * partial)
    assert torch.equal(keys[..., rotary_dim:], plain[..., rotary_dim:])


def test_the_table_is_the_models_in_the_models_dtype(build: Build, made: dict[Any, Any]) -> None:
    config = llama(build)
    config.model_config.dtype = torch.bfloat16
    with set_current_vllm_config(config):
        module = get_rope(HEAD_DIM, POSITIONS, False, YARN, torch.float32)
    rope = model_rope(config)
    assert rope.cos.dtype == torch.bfloat16
    assert not rope.neox
    query = torch.zeros(1, HEAD_DIM, dtype=torch.bfloat16)
    module.forward_native(torch.zeros(1, dtype=torch.int64), query, query)  # casts the table
    assert torch.equal(torch.cat([rope.cos, rope.sin], dim=-1), module.cos_sin_cache)


def test_other_head_sizes_are_not_of_this_model(build: Build, made: dict[Any, Any]) -> None:
    config = llama(build)
    rotary(config)
    with set_current_vllm_config(config):
        get_rope(2 * HEAD_DIM, POSITIONS, True, {}, torch.float32)
    assert model_rope(config).rotary_dim == HEAD_DIM


def test_one_module_or_none(build: Build, made: dict[Any, Any]) -> None:
    config = llama(build)
    with pytest.raises(UnsupportedError, match="has none"):
        model_rope(config)
    module = rotary(config)
    made["again"] = module
    assert model_rope(config).positions == POSITIONS
    rotary(config, rope_theta=5e5)
    with pytest.raises(UnsupportedError, match=r"\['RotaryEmbedding', 'RotaryEmbedding'\]"):
        model_rope(config)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "default", "mrope_section": [2, 3, 3]},
        {"rope_type": "linear", "factor": [2.0, 4.0]},
        {**LONGROPE, "rope_type": "longrope", "original_max_position_embeddings": 256},
        {"rope_type": "ntk", "factor": 2.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_other_tables_are_refused(
    build: Build, made: dict[Any, Any], parameters: dict[str, Any]
) -> None:
    config = llama(build)
    rotary(config, **parameters)
    with pytest.raises(UnsupportedError, match="cannot move K rotated by"):
        model_rope(config)


def test_a_subclass_is_another_class(build: Build, made: dict[Any, Any]) -> None:
    config = llama(build)
    module = rotary(config)
    module.__class__ = type("Special", (type(module),), {})
    with pytest.raises(UnsupportedError, match="Special"):
        model_rope(config)
