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


def answered(store: Store, message: Any) -> Any:
    """What a daemon would answer, in plain types."""
    return msgspec.to_builtins(_answer(store, message))


def _answer(store: Store, message: Any) -> Any:
    if isinstance(message, protocol.Stats):
        return store.stats()
    if isinstance(message, QUESTIONS):
        return answer(store, message)
    if isinstance(message, protocol.Clear):
        return store.clear()
    return do_chore(store, message)


def alone(config: StoreConfig) -> Store:
    """The home opened for one message. Nothing is merged, and nothing goes for a budget or for a
    tier that is not there: the home may be used with other settings than those of this process.

    `ConfigError` if the store has used a remote and the settings name none.
    """
    chosen = msgspec.structs.replace(
        config,
        host_bytes=min(config.host_bytes, _HOST_BYTES),
        disk_bytes=max(config.disk_bytes, shutil.disk_usage(config.home_path).total),
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
    return Store(chosen, visiting=True)
