"""Answers a message for a home that nobody serves, in this process."""

from __future__ import annotations

import shutil
from typing import Any

import msgspec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.chores import do_chore
from kvshare_store.daemon.questions import QUESTIONS, answer
from kvshare_store.store import Store

_HOST_BYTES = 256 * 2**20
_NEVER = 2**62


def answered(store: Store, message: Any, config: StoreConfig) -> Any:
    """What a daemon with these settings would answer, in plain types."""
    return msgspec.to_builtins(_answer(store, message, config))


def _answer(store: Store, message: Any, config: StoreConfig) -> Any:
    if isinstance(message, protocol.Stats):
        return _as_configured(store.stats(), config)
    if isinstance(message, QUESTIONS):
        return answer(store, message)
    if isinstance(message, protocol.Clear):
        return store.clear()
    return do_chore(store, message)


def _as_configured(stats: dict[str, Any], config: StoreConfig) -> dict[str, Any]:
    """The budgets that a daemon would have, in place of those of `alone`; and no daemon."""
    budgets = {
        "host": config.host_bytes,
        "disk": config.disk_bytes,
        "remote": config.remote_bytes,
    }
    tiers = {
        name: use | {"budget": budgets.get(name) or use["budget"]}
        for name, use in stats["tiers"].items()
    }
    return stats | {"pid": None, "since": None, "tiers": tiers}


def alone(config: StoreConfig, *, new: bool = False) -> Store:
    """The home opened for one message. Nothing is merged, and nothing goes for a budget or for a
    tier that is not there: the home may be used with other settings than those of this process.
    `new`: there is no store yet, so these settings are its first ones.

    `ConfigError` if the store has used a remote and the settings name none.
    """
    room = 0 if new else shutil.disk_usage(config.home_path).total
    chosen = msgspec.structs.replace(
        config,
        host_bytes=min(config.host_bytes, _HOST_BYTES),
        disk_bytes=max(config.disk_bytes, room),
        remote_bytes=0,
        max_nodes=_NEVER,
        namespace_bytes=0,
        namespace_nodes=0,
        tenant_limits="",
        semantic="never",
        gc_seconds=0.0,
        max_chain=_NEVER,
        max_scatter=float(_NEVER),
    )
    return Store(chosen, visiting=not new)
