"""Which models KVShare serves, and the rotary table of the loaded model.

Reuse moves K between positions and computes runs of a prompt out of order. Both are right only if
every layer is causal attention over all earlier tokens and rotates K by one table that depends on
the position alone. Models not known to be so are declined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvshare_connectors.vllm.types import model_dtype

from kvshare_store.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvshare_store.tensors.rope import Rope

ARCHITECTURES = frozenset(
    {
        "ApertusForCausalLM",
        "CohereForCausalLM",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "ExaoneForCausalLM",
        "FalconForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "HyperCLOVAXForCausalLM",
        "IQuestCoderForCausalLM",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "LLaMAForCausalLM",
        "LlamaForCausalLM",
        "MiniCPMForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "OlmoeForCausalLM",
        "OrionForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "SolarForCausalLM",
        "StableLmForCausalLM",
        "TeleChat3ForCausalLM",
    }
)
"""Architectures whose code in vllm/model_executor/models was read: every attention layer rotates K
by one `get_rope` module made from the config's rotary parameters. Whether a layer leaves that out
(NoPE) or has its own is decided in that code; a config does not show it."""

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Scalings whose table depends on the position alone."""

_DECLINED_ROPE_TYPES = {
    "dynamic": "rope_dynamic",
    "longrope": "rope_longrope",
    "su": "rope_longrope",
    "mrope": "rope_mrope",
    "bailing_mrope": "rope_mrope",
    "openpangu": "rope_mrope",
}
_FULL_ATTENTION = {"attention", "full_attention"}
_WINDOWED = {"hybrid_sliding", "sliding_attention", "window_attention"}
_NOPE_FIELDS = (
    "layer_rope_theta",
    "no_rope_layer_interval",
    "no_rope_layers",
    "nope_layer_interval",
    "rope_layers",
)


def decline_reason(vllm_config: VllmConfig) -> str | None:
    """Why KVShare does not serve this engine, as a stable code; None if it does.

    Judged from the configuration alone, so both sides of the connector agree. The worker then
    checks what was built, in `model_rope` and `PagedCache.from_context`.
    """
    judges: tuple[Callable[[VllmConfig], str | None], ...] = (
        _engine_reason,
        _model_reason,
        _cache_reason,
        _attention_reason,
        _rope_reason,
        _architecture_reason,
    )
    return next((reason for judge in judges if (reason := judge(vllm_config))), None)


def _engine_reason(vllm_config: VllmConfig) -> str | None:
    """Modes in which a step is not one forward of whole rows on one rank."""
    parallel = vllm_config.parallel_config
    return _first(
        ("tensor_parallel", parallel.tensor_parallel_size > 1),
        ("pipeline_parallel", parallel.pipeline_parallel_size > 1),
        (
            "context_parallel",
            max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
        ),
        ("ubatching", parallel.use_ubatching),
        ("speculative_decoding", vllm_config.speculative_config is not None),
    )


def _model_reason(vllm_config: VllmConfig) -> str | None:
    """Models that are not causal decoders of plain attention layers."""
    model = vllm_config.model_config
    return _first(
        ("encoder_decoder", model.is_encoder_decoder),
        ("pooling_model", model.runner_type != "generate"),
        ("diffusion", model.is_diffusion),
        ("mamba_or_hybrid", model.is_attention_free or model.is_hybrid or model.has_inner_state),
        ("mla", model.is_deepseek_mla or model.use_mla),
        ("bidirectional", not getattr(model.hf_text_config, "is_causal", True)),
    )


def _cache_reason(vllm_config: VllmConfig) -> str | None:
    """KV caches that do not hold every layer's K and V in the model's own dtype."""
    cache, text = vllm_config.cache_config, vllm_config.model_config.hf_text_config
    dtype = str(cache.cache_dtype)
    own = {"auto", str(vllm_config.model_config.dtype).removeprefix("torch.")}
    return _first(
        ("kv_cache_dtype_fp8", dtype.startswith("fp8")),
        ("kv_cache_dtype_other", dtype not in own),
        ("kv_sharing", cache.kv_sharing_fast_prefill or _given(text, "num_kv_shared_layers")),
    )


def _attention_reason(vllm_config: VllmConfig) -> str | None:
    """Attention that does not see all earlier tokens, or adds a bias by distance."""
    model = vllm_config.model_config
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ()) - _FULL_ATTENTION
    windows = (
        model.get_sliding_window(),
        model.rswa_window,
        vllm_config.cache_config.sliding_window,
    )
    return _first(
        ("alibi", model.uses_alibi or _given(text, "use_alibi")),
        ("chunked_attention", "chunked_attention" in kinds or _given(text, "attention_chunk_size")),
        ("sliding_window", bool(kinds & _WINDOWED) or any(windows)),
        ("mamba_or_hybrid", bool(kinds & {"linear_attention", "mamba", "recurrent", "conv"})),
        ("attention_unknown", bool(kinds)),
    )


def _rope_reason(vllm_config: VllmConfig) -> str | None:
    """Rotary embeddings that are missing, differ by layer, or use an unlisted scaling.

    `rope_parameters` is what transformers 5 makes of every older spelling; vLLM fills it in for
    configs of custom code (`patch_rope_parameters`).
    """
    text = vllm_config.model_config.hf_text_config
    found: Any = getattr(text, "rope_parameters", None)
    parameters = found if isinstance(found, dict) else {}
    rope_type = parameters.get("rope_type")
    return _first(
        ("rope_mrope", vllm_config.model_config.uses_mrope or "mrope_section" in parameters),
        ("rope_dual_chunk", _given(text, "dual_chunk_attention_config")),
        ("rope_missing", not parameters),
        ("rope_per_layer", any(isinstance(value, dict) for value in parameters.values())),
        ("rope_fope", bool(parameters.get("use_fope"))),
        (_DECLINED_ROPE_TYPES.get(str(rope_type), "rope_unknown"), rope_type not in ROPE_TYPES),
        ("rope_unknown", not isinstance(parameters.get("factor", 1.0), int | float)),
    )


def _architecture_reason(vllm_config: VllmConfig) -> str | None:
    """Models whose code is not known to treat all layers alike."""
    model = vllm_config.model_config
    text = model.hf_text_config
    return _first(
        ("nope_layers", any(_given(text, field) for field in _NOPE_FIELDS)),
        ("multimodal_model", model.is_multimodal_model),
        ("transformers_backend", model.using_transformers_backend()),
        ("architecture_unlisted", model.architecture not in ARCHITECTURES),
    )


def _given(config: object, field: str) -> bool:
    """Whether the config sets the field to something that is not empty, zero or false."""
    return bool(getattr(config, field, None))


def _first(*findings: tuple[str, bool]) -> str | None:
    return next((code for code, holds in findings if holds), None)


def model_rope(vllm_config: VllmConfig) -> Rope:
    """The cos/sin table that the loaded model rotates with. Worker side, after the model is loaded.

    vLLM's models share their rotary modules through `get_rope`, which keeps them in `_ROPE_DICT`
    (vllm/model_executor/layers/rotary_embedding/__init__.py) until the worker shuts down. A
    connector has no other way to find them. There must be exactly one for this model's heads.

    Raises `UnsupportedError` if there is none or more than one, or it is of a class whose table
    does not depend on the position alone.
    """
    from vllm.model_executor.layers import rotary_embedding  # noqa: PLC0415 - needs torch
    from vllm.model_executor.layers.rotary_embedding import (  # noqa: PLC0415
        base,
        linear_scaling_rope,
        llama3_rope,
        yarn_scaling_rope,
    )

    from kvshare_store.tensors.rope import Rope  # noqa: PLC0415

    served = (
        base.RotaryEmbedding,
        linear_scaling_rope.LinearScalingRotaryEmbedding,
        llama3_rope.Llama3RotaryEmbedding,
        yarn_scaling_rope.YaRNScalingRotaryEmbedding,
    )
    made = rotary_embedding._ROPE_DICT.values()
    head_size = vllm_config.model_config.get_head_size()
    modules = list({id(rope): rope for rope in made if rope.head_size == head_size}.values())
    names = sorted(type(rope).__name__ for rope in modules)
    if len(modules) != 1:
        raise UnsupportedError(
            f"KVShare needs a model with one rotary embedding, this process has {names or 'none'}"
        )
    rope = modules[0]
    # Not isinstance: a subclass may compute another table, or use it in another way.
    if type(rope) not in served or len(getattr(rope, "scaling_factors", [1])) != 1:
        raise UnsupportedError(f"KVShare cannot move K rotated by {names[0]}")
    # vLLM casts the table to the dtype of the queries when it is first used.
    table = rope.cos_sin_cache.detach().to("cpu", model_dtype(vllm_config.model_config))
    return Rope.from_cache(table, bool(rope.is_neox_style))
