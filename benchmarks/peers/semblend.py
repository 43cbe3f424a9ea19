"""SemBlend's vLLM connector beside KVShare: misses, the same prompt again, and similar prompts."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.harness.result import Options, Result
from benchmarks.peers.compare import Peer, compare, draw, table
from benchmarks.peers.environment import python_with

__all__ = ["draw", "measure"]

VERSIONS = "semblend 0.3.25, semblend-vllm-connector 0.2.8"
_SPAN = 256
_SIMILARITY = 0.6


def measure(options: Options) -> Result:
    """Serve every prompt once, again, and changed."""
    python = python_with("semblend_vllm_connector")
    with tempfile.TemporaryDirectory(prefix="semblend-bench-") as folder:
        peer = Peer("semblend", semblend_settings(folder), python, salted=False)
        samples = compare(peer, options)
    notes = [
        f"{VERSIONS}; mode semantic_span_experimental (its default only records what it could "
        f"reuse), spans from {_SPAN} tokens on, similarity from {_SIMILARITY} on, KV on disk "
        "as by default",
        "sent without cache_salt: with one it finds donors but never their KV, because it stores "
        "them by a request object that has no cache_salt in vLLM 0.32",
        "on stock vLLM it serves one contiguous span, which must begin where vLLM's own prefix "
        "ends; what follows the first change is computed, and a first change within "
        f"{_SPAN} tokens means no reuse",
        "its embedder names a model on a hub; the same model from a package was put in its place",
    ]
    return table("semblend", "SemBlend and KVShare on the same prompts", notes, samples, options)


def semblend_settings(folder: str) -> dict[str, Any]:
    """What turns SemBlend's reuse on in a vLLM engine; its KV goes to `folder`."""
    extra = {
        "mode": "semantic_span_experimental",
        "provider": "semblend",
        "embedder_type": "minilm",
        "enable_prompt_text": True,
        "min_prompt_tokens": 512,
        "min_semantic_span": _SPAN,
        "min_similarity": _SIMILARITY,
        "min_reuse_ratio": 0.3,
        "kv_storage_backend": "disk",
        "kv_storage_path": folder,
        "log_decisions": False,
    }
    transfer = {
        "kv_connector": "SemBlendVllmConnector",
        "kv_connector_module_path": "semblend_vllm_connector.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return {"kv_transfer_config": transfer}
