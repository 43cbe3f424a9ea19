"""The server behind a remote tier, which can be killed like the other processes."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from kvshare_store.errors import UnsupportedError
from tests.support.servers import (
    MooncakeClient,
    MooncakeMaster,
    RedisServer,
    S3Server,
    Server,
)


class RemoteServer(ABC):
    """A storage server on this machine."""

    keeps = True
    """Whether its data survives a kill."""
    environment: dict[str, str] = {}  # noqa: RUF012 - read only
    """Environment variables that its clients need."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The address for a store's configuration."""

    @abstractmethod
    def start(self) -> None:
        """Start it with the data it has kept."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL."""

    def close(self) -> None:
        """Stop it for good."""
        self.kill()

    def settings(self, chance: random.Random) -> dict[str, Any]:
        """Settings with which a store uses it."""
        write = chance.choice(["through", "back"])
        return {"remote": self.url, "remote_write": write, "remote_timeout_ms": 300.0}


class Folder(RemoteServer):
    """For `file://` there is no process: the folder is moved away and back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    @property
    def url(self) -> str:
        return self._folder.as_uri()

    def start(self) -> None:
        away = self._away()
        if away.exists():
            if self._folder.exists():  # what was written meanwhile is lost with this folder
                self._folder.rename(self._folder.with_name(f"meanwhile-{away.stat().st_ino}"))
            away.rename(self._folder)

    def kill(self) -> None:
        if self._folder.exists():
            self._folder.rename(self._away())

    def _away(self) -> Path:
        return self._folder.with_name("away")


class Real(RemoteServer):
    """One of the servers of `tests.support.servers`."""

    def __init__(self, server: RedisServer | S3Server) -> None:
        self._server = server
        if isinstance(server, S3Server):
            self.environment = server.environment

    @property
    def url(self) -> str:
        return self._server.url("chaos")

    def start(self) -> None:
        self._server.start()

    def kill(self) -> None:
        self._server.kill()


class Mooncake(RemoteServer):
    """A Mooncake master and one process that lends memory. If either dies, all data is lost."""

    keeps = False

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._master = MooncakeMaster(folder / "master")
        self._memory = MooncakeClient(folder / "memory", self._master)
        self._chance = chance

    @property
    def url(self) -> str:
        return self._master.url("chaos")

    def start(self) -> None:
        if self._master.process is None:
            self._memory.kill()
            self._master.start()
        if self._memory.process is None:
            self._memory.start()

    def kill(self) -> None:
        victim: Server = self._chance.choice([self._master, self._memory])
        victim.kill()

    def close(self) -> None:
        """Kill both."""
        self._memory.kill()
        self._master.kill()


def remote_server(kind: str, folder: Path, chance: random.Random) -> RemoteServer | None:
    """A server of one kind, not yet started; None for `none`. `UnsupportedError` if it is not
    installed."""
    if kind == "none":
        return None
    if kind == "file":
        return Folder(folder / "remote")
    if kind == "redis" and RedisServer.installed():
        return Real(RedisServer(folder / "redis"))
    if kind == "s3" and S3Server.installed():
        return Real(S3Server(folder / "s3"))
    if kind == "mooncake" and MooncakeMaster.installed():
        return Mooncake(folder, chance)
    raise UnsupportedError(f"remote {kind!r} is unknown, or not installed on this machine")
