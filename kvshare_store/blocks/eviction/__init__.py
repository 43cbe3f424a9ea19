"""Which block goes first. `docs/design/eviction.md` says why there are these three policies."""

from __future__ import annotations

from kvshare_store.blocks.eviction.base import EvictionPolicy
from kvshare_store.blocks.eviction.ranked import LRU, CostAware
from kvshare_store.blocks.eviction.s3fifo import S3FIFO
from kvshare_store.errors import ConfigError

__all__ = ["LRU", "POLICIES", "S3FIFO", "CostAware", "EvictionPolicy", "make_policy"]

POLICIES: dict[str, type[EvictionPolicy]] = {"cost": CostAware, "lru": LRU, "s3fifo": S3FIFO}


def make_policy(name: str) -> EvictionPolicy:
    """The policy of that name: `cost`, `lru` or `s3fifo`."""
    if name not in POLICIES:
        raise ConfigError(f"eviction must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]()
