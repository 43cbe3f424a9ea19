"""Real servers on this machine that can be stopped, paused and killed, for tests of the remotes.

Every server listens on a free port of 127.0.0.1 or of a `tests.support.network` host, keeps its
data in a given folder, and ends with its context. A pause is SIGSTOP: connections are still
accepted, but nothing is answered.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

from tests.support.network import Host

T = TypeVar("T")
_START_S = 30.0
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
"""Credentials that the S3 server accepts; clients read them from the environment."""
BUCKET = "kvshare"


def free_port(address: str = "127.0.0.1") -> int:
    """A free port of an address."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Server(ABC):
    """One server process. As a context manager it is started and ended."""

    def __init__(self, folder: Path, host: Host | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.host = host
        self.address = "127.0.0.1" if host is None else host.address
        self.port = self._here(lambda: free_port(self.address))
        self.process: subprocess.Popen[bytes] | None = None

    def _here(self, function: Callable[[], T]) -> T:
        """Call a function on the server's host."""
        return function() if self.host is None else self.host.here(function)

    @staticmethod
    @abstractmethod
    def installed() -> bool:
        """Whether this machine can run it."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Its command line."""

    def start(self) -> None:
        """Start it on its port and wait until it accepts connections."""
        line = [*([] if self.host is None else self.host.prefix), *self.command()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                line, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.wait_until(lambda: self._here(self._accepts))

    def wait_until(self, ready: object) -> None:
        """Poll until `ready()` is true. Fails with the log when the server ends or takes too
        long."""
        assert callable(ready)
        assert self.process is not None
        deadline = time.monotonic() + _START_S
        while not ready():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def _accepts(self) -> bool:
        try:
            socket.create_connection((self.address, self.port), 1).close()
        except OSError:
            return False
        return True

    def log(self) -> str:
        """Its output so far."""
        return (self.folder / "log").read_text(errors="replace")

    def pause(self) -> None:
        """Pause it; returns when all of its threads have stopped."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it continue."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, paused or not; its data stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(_START_S)
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


class RedisServer(Server):
    """`redis-server` that logs every command to a file, so that a kill loses nothing."""

    @staticmethod
    def installed() -> bool:
        return shutil.which("redis-server") is not None

    def command(self) -> Sequence[str]:
        options = {
            "port": str(self.port),
            "bind": self.address,
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
        }
        return ["redis-server", *(part for n, v in options.items() for part in (f"--{n}", v))]

    def url(self, prefix: str = "") -> str:
        """A remote's address with a prefix of its own."""
        return f"redis://{self.address}:{self.port}/0?prefix={quote(prefix)}"


class S3Server(Server):
    """`rclone serve s3` over a folder, with one bucket."""

    @staticmethod
    def installed() -> bool:
        return _rclone().is_file()

    def command(self) -> Sequence[str]:
        (self.folder / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        address, keys = f"{self.address}:{self.port}", f"{ACCESS_KEY},{SECRET_KEY}"
        serve = ["serve", "s3", "--addr", address, "--auth-key", keys, str(self.folder / "data")]
        return [str(_rclone()), "--config", str(self.folder / "no-config"), *serve]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that its clients need."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def url(self, prefix: str = "") -> str:
        """A remote's address with a prefix of its own."""
        endpoint = quote(f"http://{self.address}:{self.port}", safe="")
        return f"s3://{BUCKET}/{prefix}?endpoint={endpoint}&allow_http=true"


class MooncakeMaster(Server):
    """The master of a Mooncake Store, which knows where each object lies."""

    def __init__(self, folder: Path, host: Host | None = None) -> None:
        super().__init__(folder, host)
        self.admin_port = self._here(lambda: free_port(self.address))

    @staticmethod
    def installed() -> bool:
        return importlib.util.find_spec("mooncake") is not None and _loads_mooncake()

    def command(self) -> Sequence[str]:
        return [
            str(_mooncake("mooncake_master")),
            f"--rpc_address={self.address}",
            f"--rpc_port={self.port}",
            f"--metrics_host={self.address}",
            f"--metrics_port={self.admin_port}",
            "--logtostderr",
        ]

    def url(self, prefix: str = "", segment: str = "0B") -> str:
        """A remote's address with a prefix of its own."""
        admin = f"{self.address}:{self.admin_port}"
        where = f"mooncake://{self.address}:{self.port}/{prefix}"
        return f"{where}?admin={admin}&segment={segment}&buffer=32MiB"


class MooncakeClient(Server):
    """A process that lends its memory to a Mooncake Store."""

    def __init__(self, folder: Path, master: MooncakeMaster, segment: str = "128MB") -> None:
        super().__init__(folder, master.host)
        self.master = master
        self.segment = segment

    @staticmethod
    def installed() -> bool:
        return MooncakeMaster.installed()

    def command(self) -> Sequence[str]:
        return [
            str(_mooncake("mooncake_client")),
            f"--host={self.address}",
            f"--port={self.port}",
            f"--master_server_address={self.master.address}:{self.master.port}",
            "--metadata_server=P2PHANDSHAKE",
            f"--global_segment_size={self.segment}",
            "--local_buffer_size=16MB",
            "--logtostderr",
        ]

    def start(self) -> None:
        """Start it and wait until the master knows of its memory."""
        seen = self.master.log().count("action=mount_segment")
        super().start()
        self.wait_until(lambda: self.master.log().count("action=mount_segment") > seen)


def _rclone() -> Path:
    return Path(sys.executable).parent / "rclone"


def _mooncake(program: str) -> Path:
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations))) / program


def _loads_mooncake() -> bool:
    """Whether Mooncake can run here. Its wheel needs the system's RDMA libraries even over TCP."""
    probe = [sys.executable, "-c", "import mooncake.store"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
