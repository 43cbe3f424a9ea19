"""Engines and daemons in containers that share some parts of the machine and not others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from kvshare_store.daemon.client import Client
from tests.daemon import container_client
from tests.daemon.container_client import PATIENCE_S, config
from tests.support.daemons import Daemon
from tests.support.needs import need

ROOT = Path(__file__).parents[2]
MOUNTS = ("unshare", "--mount")
PROCESSES = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


class Container:
    """`container_client.py`, run under a command that isolates it from parts of the machine."""

    def __init__(
        self, wall: tuple[str, ...], home: Path, *arguments: str, before: str = ""
    ) -> None:
        script = [sys.executable, container_client.__file__, str(home), *arguments]
        inside = f"{before}exec {' '.join(script)}"
        self.process = subprocess.Popen(
            [*wall, "sh", "-c", inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        )

    def ask(self, command: str) -> str:
        """Send a command; returns the answer."""
        self.tell(command)
        return self.answer()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the client itself."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.send(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def walls() -> None:
    """A mount and a PID namespace of its own."""
    for wall in (MOUNTS, PROCESSES):
        done = subprocess.run([*wall, "true"], capture_output=True, check=False)
        need(done.returncode == 0, "the right to make namespaces (unshare)")


@pytest.fixture
def outside(home: Path) -> Iterator[Client]:
    """A daemon with room for 10 blocks, which are two prompts, and a client beside it."""
    with Daemon(config(str(home), blocks=10)), Client(home, timeout=PATIENCE_S) as client:
        yield client


def test_two_homes_with_one_path(walls: None, tmp_path: Path) -> None:
    """Two containers of one user have homes at the same path, a daemon each, and one /dev/shm.
    Neither sees, overwrites or removes what the other has in memory."""
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home, other):
        folder.mkdir(mode=0o700)
    mount = f"mount --bind {other} {home} && "
    with Daemon(config(str(home))), Client(home, timeout=PATIENCE_S) as client:
        mine = container_client.Engine(client)
        assert mine.save(1) == "True"
        with Container(MOUNTS, home, "daemon", before=mount) as theirs:
            assert theirs.ask("save 2") == "True"
            assert mine.save(3) == "True"
            assert theirs.ask("serve 2") == "39"
            assert theirs.ask("serve 1") == "0", "that is the other home's prompt"
            assert theirs.ask("hold 2") == "39"
        assert (mine.serve(1), mine.serve(2), mine.serve(3)) == ("39", "0", "39")


def test_a_client_in_another_pid_namespace(walls: None, outside: Client, home: Path) -> None:
    engine = container_client.Engine(outside)
    assert engine.save(1) == "True"
    with Container(PROCESSES, home) as client:
        assert client.ask("serve 1") == "39"
        assert client.ask("save 2") == "True"
    assert engine.serve(2) == "39"


def test_a_client_that_is_frozen(walls: None, outside: Client, home: Path) -> None:
    """The client keeps what it holds while its connection lives, whatever its process id is. What
    it does when it continues changes nobody else's rows."""
    engine = container_client.Engine(outside)
    assert engine.save(1) == "True"
    with Container(PROCESSES, home) as client:
        assert client.ask("hold 1") == "39"
        assert client.ask("stage 2") == "40"
        client.send(signal.SIGSTOP)
        time.sleep(2.5)  # the daemon looks for dead clients every second
        for seed in (3, 4, 5):  # more than fits into memory beside the leased prompt
            outside.flush()
            assert engine.save(seed) == "True"
            assert engine.serve(seed) == "39"
        stats = outside.stats()
        assert (stats["leases"], stats["staged"]) == (1, 1)
        client.send(signal.SIGCONT)
        outside.flush()
        assert client.ask("commit") == "True"
        outside.flush()
        assert [client.ask(f"serve {seed}") for seed in (2, 5, 1)] == ["39", "39", "39"]
        assert engine.serve(5) == "39"
        client.send(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while outside.stats()["leases"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert outside.stats()["leases"] == 0, "its connection is gone"
