"""What answers messages for a home: its daemon, or this process if none runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvshare_store.cli.libraries import load_lancedb
from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import connect
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import place_of
from kvshare_store.errors import HomeError, UnavailableError

Ask = Callable[[Any], Any]

_PATIENCE_S = 3600.0


@contextmanager
def chores(config: StoreConfig, *, new: bool = False) -> Iterator[Ask]:
    """`ask(message)`: the answer in plain types, with a daemon or without.

    `HomeError` if there is no store in the home. `new`: then one is made.
    """
    if _served(config, new=new):
        with Client(place_of(config)) as client:
            client.greet()  # a daemon that hangs is found out now: a chore may take an hour
            yield lambda message: client.call(message, timeout=_PATIENCE_S)
        return
    load_lancedb()
    from kvshare_store.cli.offline import alone, answered  # noqa: PLC0415 - seconds, not with a daemon

    with alone(config, new=new) as store:
        yield lambda message: answered(store, message, config)


def has_store(config: StoreConfig) -> bool:
    """Whether a daemon elsewhere has the store, or the home holds one."""
    return bool(config.connect) or (config.home_path / "format").exists()


def refuse_without_store(config: StoreConfig) -> None:
    """`HomeError` if the home holds no store: then its path is probably mistyped."""
    if not has_store(config):
        what = "is a file, no folder" if config.home_path.is_file() else "has no store"
        raise HomeError(
            f"home {config.home_path} {what}; name another with --home, or start a store there "
            "with `kvshare serve`"
        )


def _served(config: StoreConfig, *, new: bool) -> bool:
    home = config.home_path
    if config.connect:
        return True
    try:
        connect(home).close()
    except UnavailableError:
        if not new:
            refuse_without_store(config)
        return False
    return True
