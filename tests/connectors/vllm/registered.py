"""The connector's metrics in a registry of their own, as vLLM's front end makes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvshare_connectors.vllm.metrics import KVSharePromMetrics
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LABELS = ["model_name", "engine"]


def registered(registry: CollectorRegistry, model: str, engines: int) -> KVSharePromMetrics:
    """For so many engines of a model behind one front end."""

    def inside(kind: Any) -> Any:
        return lambda *args, **kwargs: kind(*args, **kwargs, registry=registry)

    kinds = {kind: inside(kind) for kind in (Counter, Gauge, Histogram)}
    values: dict[int, list[object]] = {at: [model, str(at)] for at in range(engines)}
    config: Any = SimpleNamespace(kv_transfer_config=None)
    return KVSharePromMetrics(config, kinds, LABELS, values)
