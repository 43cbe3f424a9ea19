"""The daemon as the commands see it. Imports the store's libraries: load it only when needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import home_taken
from kvshare_store.daemon.client import Client

_CLEAR_S = 600.0


class Daemon:
    """A running daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def stats(self) -> dict[str, Any]:
        """As `Store.stats`."""
        return self._client.stats()

    def nodes(self, limit: int) -> list[dict[str, Any]]:
        """Summaries of the nodes, the most recently used first."""
        found: list[dict[str, Any]] = self._client.call(protocol.ListNodes(limit))
        return found

    def node(self, beginning: str) -> dict[str, Any]:
        """One node in full; `NodeError` unless exactly one begins so."""
        found: dict[str, Any] = self._client.call(protocol.ShowNode(beginning))
        return found

    def clear(self) -> int:
        """Forget every node; returns how many there were."""
        return int(self._client.call(protocol.Clear(), timeout=_CLEAR_S))

    def stop(self) -> int:
        """Tell the daemon to stop; returns its process id."""
        pid = self._client.greet().pid
        self._client.call(protocol.Stop())
        return pid

    def gone(self, patience: float) -> bool:
        """Wait until the stopped daemon has left its home; False after `patience` seconds."""
        deadline = time.monotonic() + patience
        while home_taken(self._client.home):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def connected(config: StoreConfig) -> Iterator[Daemon]:
    """The daemon of a home; says at once when there is none."""
    with Client(config.home_path) as client:
        client.open()
        yield Daemon(client)
