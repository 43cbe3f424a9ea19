"""Messages about maintenance, answered by a daemon or by a process that has opened the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from kvshare_store.daemon import protocol
from kvshare_store.daemon.describe import found_node, pin_node
from kvshare_store.daemon.evicting import chosen_nodes, evict_nodes
from kvshare_store.errors import ConfigError
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.maintenance.moving import export_nodes, import_nodes
from kvshare_store.maintenance.purge import Purged
from kvshare_store.store import Store

Chore = (
    protocol.Pin | protocol.Evict | protocol.Export | protocol.Import | protocol.Collect
    | protocol.Purge | protocol.CheckTree | protocol.CheckBlocks
)  # fmt: skip
CHORES = get_args(Chore)


def do_chore(store: Store, message: Chore, given_up: Callable[[], bool] = lambda: False) -> Any:
    """Answer one message. It may take long, but no request waits for it. `given_up`: whether nobody
    wants the answer any more."""
    if isinstance(message, protocol.Pin):
        return pin_node(store, message.node, message.pinned)
    if isinstance(message, protocol.Evict):
        return evict_nodes(store, message)
    if isinstance(message, protocol.Export):
        meant = protocol.Evict(message.nodes, message.tenant)
        nodes = chosen_nodes(store, meant)
        return export_nodes(store.repository, nodes, _path(message.path), plain=message.plain)
    if isinstance(message, protocol.Import):
        return import_nodes(store.repository, _path(message.path))
    if isinstance(message, protocol.Collect):
        return store.collect(dry_run=message.dry_run)
    if isinstance(message, protocol.Purge):
        return _purge(store, message, given_up)
    if isinstance(message, protocol.CheckTree):
        return check_tree(store.repository, repair=message.repair)
    return check_blocks(store.repository, message.names, repair=message.repair)


def _purge(store: Store, message: protocol.Purge, given_up: Callable[[], bool]) -> list[Purged]:
    if message.lineage:
        if message.namespace or message.tenant is not None or message.pool:
            raise ConfigError("name what to purge: a namespace, a tenant or a node, and only one")
        node = found_node(store, message.lineage)
        return [store.purge_lineage(node.id, dry_run=message.dry_run)]
    return store.purge(
        message.namespace,
        tenant=message.tenant,
        pool=message.pool,
        patience=message.patience,
        dry_run=message.dry_run,
        given_up=given_up,
    )


def _path(text: str) -> Path:
    """`ConfigError` if it is no path, or not absolute: the daemon's working folder must not
    matter."""
    if "\0" in text:
        raise ConfigError(f"{text!r} has a NUL character in it, which no path may have")
    if not Path(text).is_absolute():
        raise ConfigError(f"{text!r} is not an absolute path: write it from / on")
    return Path(text)
