"""The store that engines use: a temporary home, and what its daemon has counted."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from kvshare_store.daemon.client import Client

_QUIET_S = 0.1


class StoreView:
    """The daemon of a home that engines use, seen from outside."""

    def __init__(self, home: str) -> None:
        self._client = Client(home)

    def stats(self) -> dict[str, Any]:
        """All counters of the daemon."""
        return self._client.stats()

    def settle(self, nodes: int, seconds: float) -> bool:
        """Wait for the store to have more than `nodes` nodes, all durable; False if it takes long.

        Not every prompt becomes a node: one whose every row is stored already does not.
        """
        deadline = time.monotonic() + seconds
        while self.stats()["nodes"] <= nodes:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        self._client.flush()
        return True

    def rest(self) -> None:
        """Wait until all that arrives is durable and the daemon has done its work of the
        background, such as embedding."""
        daemon = self._client.greet().pid
        wait_idle(daemon)
        self._client.flush()
        wait_idle(daemon)

    def close(self) -> None:
        """Close the connection to the daemon."""
        self._client.close()


def wait_idle(pid: int) -> None:
    """Wait until a process uses at most a fifth of a core."""
    process = psutil.Process(pid)
    while _busy(process, _QUIET_S):
        pass


def _busy(process: psutil.Process, seconds: float) -> bool:
    """Whether a process uses more than 20 % of a core during `seconds`."""
    before = sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return bool(sum(process.cpu_times()[:2]) - before > 0.2 * seconds)


@contextmanager
def temporary_home() -> Iterator[str]:
    """A temporary store; its daemon stops with the context."""
    with tempfile.TemporaryDirectory(prefix="kvshare-example-") as home:
        try:
            yield home
        finally:
            command = [sys.executable, "-m", "kvshare_store.cli.main", "stop", "--home", home]
            subprocess.run(command, capture_output=True, check=False)
