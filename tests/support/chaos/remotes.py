"""The server behind a remote tier, to be killed like everything else."""

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
    """Somebody else's storage engine on this machine."""

    keeps = True
    """Whether it has everything again after a kill."""
    environment: dict[str, str] = {}  # noqa: RUF012 - read only
    """What its clients need in their environment."""

    @property
    @abstractmethod
    def url(self) -> str:
        """What a store is configured with."""

    @abstractmethod
    def start(self) -> None:
        """Start it, with what it has kept."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL."""

    def close(self) -> None:
        """The end."""
        self.kill()

    def settings(self, chance: random.Random) -> dict[str, Any]:
        """What a store needs to use it."""
        write = chance.choice(["through", "back"])
        return {"remote": self.url, "remote_write": write, "remote_timeout_ms": 300.0}


class Folder(RemoteServer):
    """`file://` has no process: its folder goes away and comes back."""

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
    """One of `tests.support.servers`."""

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
    """A master and one process that lends memory. Either may die; nothing survives that."""

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
        """Both."""
        self._memory.kill()
        self._master.kill()


def remote_server(kind: str, folder: Path, chance: random.Random) -> RemoteServer | None:
    """A server of one kind, not started; None for `none`. `UnsupportedError` if it is not here."""
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
