"""The daemon as the commands see it. Imports the store's libraries: load it only when needed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import HomeError, UnavailableError

_PROBE_S = 2.0
"""How long a socket may take to accept a connection before it counts as hung."""


class Daemon:
    """A running daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def settings(self) -> dict[str, Any]:
        """The values that it runs with, by field."""
        found: dict[str, Any] = self._client.call(protocol.Settings())
        return found

    def stop(self) -> int:
        """Tell the daemon to stop; returns its process id."""
        pid = self._client.greet().pid
        self._client.call(protocol.Stop())
        return pid

    def gone(self, pid: int, patience: float) -> bool:
        """Wait for the stopped daemon to end; False if it has not after `patience` seconds."""
        deadline = time.monotonic() + patience
        while _alive(pid):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def connected(config: StoreConfig) -> Iterator[Daemon]:
    """The daemon of a home; says at once when there is none."""
    probe(protocol.socket_path(config.home_path), config.home_path)
    with Client(config.home_path) as client:
        yield Daemon(client)


def probe(path: Path, home: Path) -> None:
    """`UnavailableError` unless somebody accepts connections on the socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PROBE_S)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            raise UnavailableError(
                f"no daemon serves {home}; start one: kvshare serve --home {home}"
            ) from error
        except TimeoutError as error:
            raise UnavailableError(
                f"the daemon of {home} accepts no connections; end it and start it again"
            ) from error
        except OSError as error:
            raise HomeError(
                f"socket {path} cannot be reached: {error.strerror}; run as the user who started "
                "the daemon, or choose another home with --home or KVSHARE_HOME"
            ) from error


def _alive(pid: int) -> bool:
    """A process that has ended and waits for its parent to notice is not alive."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
