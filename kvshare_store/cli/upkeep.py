"""What answers messages for a home: its daemon, or this process if none runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import connect
from kvshare_store.daemon.chores import do_chore
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.questions import QUESTIONS, answer
from kvshare_store.errors import HomeError, UnavailableError
from kvshare_store.store import Store

Ask = Callable[[Any], Any]

_PATIENCE_S = 3600.0
_HOST_BYTES = 256 * 2**20
_NEVER = 2**62


@contextmanager
def chores(config: StoreConfig) -> Iterator[Ask]:
    """`ask(message)`: the answer in plain types, with a daemon or without.

    `HomeError` if there is no store in the home.
    """
    if _served(config):
        with Client(config.home_path) as client:
            yield lambda message: client.call(message, timeout=_PATIENCE_S)
        return
    with Store(_alone(config)) as store:
        yield lambda message: msgspec.to_builtins(_answer(store, message))


def _answer(store: Store, message: Any) -> Any:
    """What a daemon would answer."""
    if isinstance(message, protocol.Stats):
        return store.stats()
    if isinstance(message, QUESTIONS):
        return answer(store, message)
    if isinstance(message, protocol.Clear):
        return store.clear()
    return do_chore(store, message)


def refuse_without_store(config: StoreConfig) -> None:
    """`HomeError` if the home holds no store: then its path is probably mistyped."""
    if not (config.home_path / "format").exists():
        what = "is a file, no folder" if config.home_path.is_file() else "has no store"
        raise HomeError(
            f"home {config.home_path} {what}; name another with --home, or start a store there "
            "with `kvshare serve`"
        )


def _served(config: StoreConfig) -> bool:
    home = config.home_path
    try:
        connect(home).close()
    except UnavailableError:
        refuse_without_store(config)
        return False
    return True


def _alone(config: StoreConfig) -> StoreConfig:
    """The home opened for one message. Nothing is merged: this process may have other budgets than
    those that the home is used with."""
    return msgspec.structs.replace(
        config,
        host_bytes=min(config.host_bytes, _HOST_BYTES),
        semantic="never",
        gc_seconds=0.0,
        max_chain=_NEVER,
        max_scatter=float(_NEVER),
    )
