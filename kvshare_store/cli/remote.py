"""The daemon from the commands' point of view. Imports the store's libraries, so load it only when
needed."""

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

    def settings(self) -> dict[str, Any]:
        """The settings that it runs with, by field."""
        found: dict[str, Any] = self._client.call(protocol.Settings())
        return found

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
    """The daemon of a home; fails at once if none runs."""
    with Client(config.home_path) as client:
        client.open()
        yield Daemon(client)
