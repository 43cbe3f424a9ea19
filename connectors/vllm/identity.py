"""From a vLLM configuration to a namespace: all that must be equal before rows are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3

from kvshare_store.errors import UnsupportedError
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_WHOLE_BYTES = 512 << 20
_SLICES = 256
_SLICE_BYTES = 256 << 10
_DTYPES = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


def namespace_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Namespace:
    """The namespace of an engine, for no tenant and no adapter.

    `UnsupportedError` for KV caches that are not plain rows of one shape.
    """
    model = vllm_config.model_config
    folder = _local_folder(model.model)
    return Namespace(
        model=model.model if folder is None else folder.name,
        revision=_fingerprint(folder) if folder else str(model.revision or "main"),
        layout=layout_of(kv_cache_config),
        kv_dtype=str(vllm_config.cache_config.cache_dtype),
        rope=json.dumps(rope_parameters(model), sort_keys=True, default=str),
        ranks=f"tp{vllm_config.parallel_config.tensor_parallel_size}",
        tokenizer=str(folder) if folder else "",
    )


def layout_of(kv_cache_config: KVCacheConfig) -> KVLayout:
    """Canonical layout of the one KV cache group (vllm/v1/kv_cache_interface.py)."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedError(f"{len(groups)} KV cache groups; KVShare serves models with one")
    spec: Any = groups[0].kv_cache_spec
    dtype = _DTYPES.get(str(spec.dtype))
    if dtype is None:
        raise UnsupportedError(f"KV dtype {spec.dtype} is not served")
    return KVLayout(len(groups[0].layer_names), spec.num_kv_heads, spec.head_size, dtype)  # type: ignore[arg-type]


def rope_parameters(model_config: Any) -> Any:
    """The rotary parameters as the model's configuration states them."""
    text = model_config.hf_text_config
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)


def _local_folder(model: str) -> Path | None:
    folder = Path(model)
    return folder.resolve() if folder.is_dir() else None


def _fingerprint(folder: Path) -> str:
    """Configuration and weights files: names, sizes, and contents.

    Of a very large file only evenly spaced slices are read: reading it all at every start would
    cost more than it proves, since what trains or merges weights changes them everywhere.
    """
    hasher = blake3.blake3()
    config = folder / "config.json"
    hasher.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        size = path.stat().st_size
        hasher.update(f"{path.name}:{size}:".encode())
        if size <= _WHOLE_BYTES:
            hasher.update_mmap(path)
        else:
            _update_with_slices(hasher, path, size)
    return hasher.hexdigest(length=16)


def _update_with_slices(hasher: blake3.blake3, path: Path, size: int) -> None:
    with path.open("rb") as file:
        for index in range(_SLICES):
            file.seek(index * (size - _SLICE_BYTES) // (_SLICES - 1))
            hasher.update(file.read(_SLICE_BYTES))
