"""Several stores, each with its own host and disk tier, that share one remote tier and one
catalogue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvshare_store.commit.condemned import now_s
from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout
from tests.support import waiting
from tests.support.oracle import Driver

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 60.0
Machine = Callable[..., Driver]


def config_of(folder: Path, name: str, **settings: Any) -> StoreConfig:
    """The store of one machine. All machines of a folder share its remote and catalogue."""
    shared = {
        "remote": f"file://{folder / 'remote'}",
        "remote_write": "through",
        "remote_timeout_ms": 5_000.0,
        "catalog": str(folder / "catalog"),
        "sync_seconds": 0.05,
    }
    small = {
        "home": str(folder / name),
        "host_bytes": 1 << 20,
        "disk_bytes": 1 << 20,
        "block_tokens": 8,
        "min_prompt_tokens": 8,
        "min_saving_ms": -1e9,
        "semantic": "never",
        "plan_deadline_ms": 20_000.0,
    }
    return StoreConfig(**{**shared, **small, **settings})


until = partial(waiting.until, seconds=PATIENCE_S)


def knows(engine: Driver, tokens: list[int]) -> bool:
    """Whether the store has a node of exactly this prompt, and is through with learning of it."""
    with engine.store.nodes.lock:
        return any(node.tokens.tolist() == tokens for node in engine.store.tree)


def save(engine: Driver, tokens: list[int]) -> str | None:
    """Store a prompt and wait until other machines can see it; returns the node's id."""
    node_id = engine.save(tokens)
    engine.store.flush()
    return node_id


def learn(engine: Driver) -> None:
    """Read the changes in the catalogue now."""
    assert engine.store.sharing is not None
    engine.store.sharing.sync()


def minutes_pass(engine: Driver, minutes: float) -> None:
    """Forget what this machine knows of condemned blocks."""
    condemned = engine.store.repository.condemned
    assert condemned is not None
    before = condemned.clock() - now_s()
    condemned.clock = lambda: now_s() + before + 60 * minutes


def collect_all(engine: Driver) -> int:
    """Run the janitor until unused blocks are found, condemned and removed; returns the number
    removed."""
    gone = 0
    for _ in range(3):
        minutes_pass(engine, 2)
        gone += engine.store.collect().blocks
    return gone


def remote_blocks(folder: Path) -> int:
    """Number of blocks in the remote tier."""
    return sum(file.is_file() for file in (folder / "remote" / "blocks").rglob("*"))
