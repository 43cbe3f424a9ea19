"""The namespace of a vLLM engine: everything that must be equal before rows are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
from huggingface_hub import snapshot_download
from kvshare_connectors.vllm.types import attention_spec

from kvshare_store.errors import UnsupportedError
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.dtypes import NAMES
from kvshare_store.tensors.layout import KVLayout

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

WEIGHTS = (".safetensors", ".bin", ".pt")
_WHOLE_BYTES = 512 << 20
_READ_BYTES = 1 << 20
_SLICES = 256
_SLICE_BYTES = 256 << 10


def namespace_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Namespace:
    """The namespace of an engine, for no tenant and no adapter.

    `UnsupportedError` for KV caches that are not plain rows of one shape.
    """
    model = vllm_config.model_config
    cache = vllm_config.load_config.download_dir
    folder = local_folder(model.model) or snapshot_of(model.model, model.revision, cache)
    weights = str(model.revision or "main") if folder is None else _weights(folder)
    loaded = _as_loaded(vllm_config)
    return Namespace(
        model=model.model if folder is None else _name(folder),
        revision=f"{weights}:{loaded}" if loaded else weights,
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
    spec = attention_spec(kv_cache_config)
    dtype = NAMES.get(spec.dtype)
    if dtype is None:
        raise UnsupportedError(f"KV dtype {spec.dtype} is not served")
    return KVLayout(len(groups[0].layer_names), spec.num_kv_heads, spec.head_size, dtype)


def rope_parameters(model_config: ModelConfig) -> object:
    """The rotary parameters as the model's configuration states them."""
    text = model_config.hf_text_config
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)


def local_folder(path: str) -> Path | None:
    """The folder itself; None if there is none."""
    folder = Path(path)
    return folder.resolve() if folder.is_dir() else None


def snapshot_of(
    repository: str, revision: str | None = None, cache: str | None = None
) -> Path | None:
    """The local snapshot of a Hugging Face repository; None if there is none. Offline."""
    try:
        found = snapshot_download(
            repository, revision=revision, cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError):  # not downloaded, or no name that a repository can have
        return None
    return Path(found).resolve()


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def _name(folder: Path) -> str:
    """The model's name: that of its folder, or of the repository for a snapshot."""
    if not _is_snapshot(folder):
        return folder.name
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")


def _weights(folder: Path) -> str:
    """A fingerprint, or the commit of a snapshot that holds no weights."""
    if _is_snapshot(folder) and not weight_files(folder):
        return folder.name
    return fingerprint(folder)


def _as_loaded(vllm_config: VllmConfig) -> str:
    """A digest of the options that change what the files mean; empty if none is set."""
    model, load = vllm_config.model_config, vllm_config.load_config
    altered = model.hf_overrides or model.hf_config_path
    facts = {
        "quantization": model.quantization,
        "quantization_config": model.quantization_config,
        # the result, since an override may be a function
        "config": model.hf_config.to_dict() if altered else None,
        "classes": model.model_class_overrides,
        "weights": model.model_weights,
        "format": load.load_format if load.load_format != "auto" else None,
        "loader": load.model_loader_extra_config,
    }
    said = {name: value for name, value in facts.items() if value}
    if not said:
        return ""
    text = json.dumps(said, sort_keys=True, default=str)
    return blake3.blake3(text.encode()).hexdigest(length=16)


def weight_files(folder: Path) -> list[Path]:
    """Files of a model's or an adapter's folder that hold weights."""
    return [path for suffix in WEIGHTS for path in sorted(folder.glob(f"*{suffix}"))]


def fingerprint(folder: Path, configuration: str = "config.json") -> str:
    """Configuration and weights files: names, sizes, and contents.

    Of a file above 512 MiB only evenly spaced slices are read. Training and merging change weights
    everywhere, so reading it all at every start would prove little more.
    """
    hasher = blake3.blake3()
    config = folder / configuration
    hasher.update(config.read_bytes() if config.is_file() else b"")
    for path in weight_files(folder):
        size = path.stat().st_size
        hasher.update(f"{path.name}:{size}:".encode())
        if size <= _WHOLE_BYTES:
            _update_with_all(hasher, path)
        else:
            _update_with_slices(hasher, path, size)
    return hasher.hexdigest(length=16)


def _update_with_all(hasher: blake3.blake3, path: Path) -> None:
    # read, not mapped: if the file shrinks meanwhile, a mapping kills the process
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            hasher.update(part)


def _update_with_slices(hasher: blake3.blake3, path: Path, size: int) -> None:
    with path.open("rb") as file:
        for index in range(_SLICES):
            file.seek(index * (size - _SLICE_BYTES) // (_SLICES - 1))
            hasher.update(file.read(_SLICE_BYTES))
