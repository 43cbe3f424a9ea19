"""Blocks moved between the tiers of a store by hand."""

from __future__ import annotations

from kvshare_store.blocks.levels import Level
from kvshare_store.store import Store


def drop_from_host(store: Store) -> None:
    """Remove every block from memory, as if others had needed the room."""
    with store.nodes.lock:
        for name in store.blocks.host.names():
            store.blocks.host.drop(name)


def disk_level(store: Store) -> Level:
    """The disk tier's level below the host."""
    level = store.blocks.levels.named("disk")
    assert level is not None
    return level
