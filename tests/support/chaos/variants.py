"""The stores that the kill test tries: budgets, codec, key, layout and policy are drawn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout

_BASE: dict[str, Any] = {
    "block_tokens": 16,
    "min_prompt_tokens": 16,
    "min_saving_ms": 0.0,
    "policy": "aggressive",
    "semantic": "never",
    "plan_deadline_ms": 20_000.0,
    "lease_seconds": 300.0,
}
"""Seconds of a lease. Long, so that a lease which was not ended is still there when the test
looks."""
_LAYOUTS = (KVLayout(2, 1, 16, "float32"), KVLayout(2, 2, 16, "bfloat16"))
_ROOMY = {"host_bytes": 16 << 20, "disk_bytes": 1 << 30}
_TIGHT = {"host_bytes": 1 << 20, "disk_bytes": 1_500_000}


class Variant(NamedTuple):
    """One configuration under test."""

    config: StoreConfig
    spaces: list[Namespace]
    roomy: bool
    """Whether nothing is ever evicted, so that every durable node must stay."""

    def __str__(self) -> str:
        room, dtype = "roomy" if self.roomy else "tight", self.spaces[0].layout.dtype
        key = "encrypted" if self.config.encryption_key else "clear"
        return f"{room}, {dtype}, codec {self.config.disk_codec}, {key}"


def variant(chance: random.Random, home: Path, **settings: Any) -> Variant:
    """The configuration of the next store, in `home`."""
    roomy = chance.random() < 0.4
    drawn = {
        "disk_codec": chance.choice(["none", "zstd", "planes"]),
        "encryption_key": chance.choice(["", f"file:{_key(home)}"]),
        "eviction": chance.choice(["cost", "lru", "s3fifo"]),
        "max_chain": chance.choice([2, 4, 16]),
        "max_scatter": chance.choice([2, 8, 32]),
        "gc_seconds": chance.choice([0.2, 1.0]),
        "max_nodes": 100_000 if roomy else chance.choice([100_000, 40]),
    }
    known = {name: value for name, value in drawn.items() if name in FIELDS}
    layout = chance.choice(_LAYOUTS)
    config = StoreConfig(home=str(home), **_BASE | (_ROOMY if roomy else _TIGHT) | known | settings)
    spaces = [Namespace("chaos", layout, tenant=tenant) for tenant in ("a", "b")]
    return Variant(config, spaces, roomy)


def _key(home: Path) -> Path:
    """Write a master key beside the home."""
    path = home.with_name("key")
    path.touch(mode=0o600)
    path.write_text("0123456789abcdef" * 4)
    return path
