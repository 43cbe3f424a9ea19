"""The daemon from the commands' point of view. Imports the store's libraries, so load it only when
needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import home_taken
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import place_of
from kvshare_store.errors import KVShareError


@contextmanager
def connected(config: StoreConfig) -> Iterator[Client]:
    """A client of a home's daemon; fails at once if none runs."""
    with Client(place_of(config)) as client:
        if client.remote:
            client.greet()
        else:
            client.open()
        yield client


def settings(client: Client) -> dict[str, Any]:
    """The settings that the daemon runs with, by field."""
    found: dict[str, Any] = client.call(protocol.Settings())
    return found


def gone(client: Client, patience: float) -> bool:
    """Wait until the stopped daemon has left its home; False after `patience` seconds."""
    deadline = time.monotonic() + patience
    while _here(client):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _here(client: Client) -> bool:
    if isinstance(client.home, Path):
        return home_taken(client.home)
    try:
        client.look()
        client.greet(1.0)
    except KVShareError:
        return False
    return True
