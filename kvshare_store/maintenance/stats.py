"""The store's report on itself: counters, budgets, times, in plain types."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from kvshare_store.commit.repository import Repository
from kvshare_store.config import StoreConfig
from kvshare_store.observability.metrics import OTHERS
from kvshare_store.observability.version import version
from kvshare_store.quality.overview import Overview

_COUNTERS = (
    "lookups", "hits_exact", "hits_continued", "hits_edited", "misses", "tokens_requested",
    "tokens_reused_exact", "tokens_reused_continued", "tokens_reused_edited",
    "tokens_recomputed", "tokens_engine_cached", "bytes_loaded", "bytes_stored",
    "answers_stored", "tokens_answers_stored", "edited_stored", "settled", "looks",
    "looks_dropped", "looks_declined", "looks_control", "quality_tightened",
)  # fmt: skip


def stats_of(
    config: StoreConfig,
    repository: Repository,
    *,
    since: float,
    staged: int,
    looks: int,
    texts: int,
    scores: dict[str, Any],
    scores_by_edit: dict[str, Any],
    quality: Overview,
) -> dict[str, Any]:
    """See `Store.stats`. `since`: when it was opened, Unix seconds; `staged`: saves that have
    begun; `looks`: edited prompts that wait for an idle engine; `texts`: prompts that wait for a
    text vector; `scores`, `scores_by_edit`: see `Verdicts`. Never waits: neither for the lock of
    the nodes nor for a first look at the disk.
    """
    metrics, blocks, tree = repository.metrics, repository.blocks, repository.nodes.tree
    return {
        "version": version(),
        "policy": config.policy,
        "pid": os.getpid(),
        "since": since,
        **metrics.counts(_COUNTERS),
        "declined": metrics.declined,
        "errors": metrics.errors,
        "nodes": len(tree),
        "blocks": tree.block_count,
        "leases": len(blocks.leases),
        "reserved": len(blocks.pool.filling()),
        "staged": staged,
        "looks_waiting": looks,
        "texts_waiting": texts,
        "scores": scores,
        "scores_by_edit": scores_by_edit,
        "quality": msgspec.to_builtins(quality),
        "tiers": blocks.report(),
        "moved": metrics.moves(),
        "evicted": metrics.evictions,
        "queue": repository.queue.report(),
        "health": metrics.health.report(),
        "catalog_bytes": repository.catalog.bytes if repository.catalog is not None else 0,
        "seconds": metrics.durations(("lookup", "load", "save")),
        "namespaces": _by_namespace(config, repository),
    }


def _by_namespace(config: StoreConfig, repository: Repository) -> dict[str, dict[str, Any]]:
    """What each namespace has requested and holds, by the label of its digest. `tenant` is included
    only if a key proves tenants: otherwise the name is the very salt that gives access."""
    state, metrics = repository.nodes.state, repository.metrics
    known = state.namespaces.by_digest()
    labels = metrics.labels(known)
    blank = {"tenant": "", "model": "", "nodes": 0, "bytes": 0}
    found = {label: {**blank, **use} for label, use in metrics.usage().items()}
    for label, (digest, space) in zip(labels, known.items(), strict=True):
        use = found.setdefault(label, {**blank, "requests": {}, "tokens": {}})
        use["nodes"] += state.tree.count_of(digest)
        use["bytes"] += state.tree.bytes_of(digest)
        if label != OTHERS:
            use["model"] = space.model
            use["tenant"] = space.tenant if config.tenant_key else ""
    return found
