"""The parts of vLLM whose annotations are missing or say too little.

All other types are vLLM's own: mypy reads the modules of vLLM that pyproject.toml lists, so it
notices when one of them changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm.config import ModelConfig
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig
    from vllm.v1.request import Request

    BlockHasher = Callable[[Request], list[BlockHash]]
    """`Request._block_hasher`: hashes of the blocks that are full now and have none yet."""


class AttentionBackend(Protocol):
    """`vllm.v1.attention.backend.AttentionBackend`."""

    @staticmethod
    def get_name() -> str: ...


class AttentionImpl(Protocol):
    """`vllm.v1.attention.backend.AttentionImpl`, which does not declare the update."""

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write K and V `[tokens, heads, dim]` into slots (int64 `[tokens]`); -1 is skipped."""


class AttentionLayer(Protocol):
    """`vllm.model_executor.layers.attention.Attention`.

    vLLM keeps its layers in `CompilationConfig.static_forward_context`, a `dict[str, Any]`. What is
    found there may be another kind of layer, so `capability` looks at every field used here.
    """

    kv_cache: Tensor
    impl: AttentionImpl
    attn_backend: type[AttentionBackend]
    attn_type: str
    head_size: int
    num_kv_heads: int
    sliding_window: int | None
    kv_sharing_target_layer_name: str | None


def attention_spec(config: KVCacheConfig) -> AttentionSpec:
    """What the blocks of the only KV cache group hold.

    vLLM types it as `KVCacheSpec`, which has no heads. Models whose layers are not all attention
    are declined before.
    """
    return cast("AttentionSpec", config.kv_cache_groups[0].kv_cache_spec)


def model_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of the model, which vLLM types as a name too: it resolves names as it starts."""
    return cast("torch.dtype", config.dtype)
