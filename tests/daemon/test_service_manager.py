"""What a daemon says to systemd, and when."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.service_manager import VARIABLES, ServiceManager
from kvshare_store.daemon.spawn import daemon_command, daemon_environment

PATIENCE_S = 60.0


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where systemd would listen; its variables are this process's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(tmp_path / "notify"))
        ear.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield ear


def heard(ear: socket.socket) -> list[str]:
    """All that was said so far."""
    said = []
    ear.setblocking(False)
    try:
        while True:
            said.append(ear.recv(1000).decode())
    except BlockingIOError:
        return said
    finally:
        ear.settimeout(PATIENCE_S)


def test_a_daemon_says_that_it_serves_lives_and_ends(manager: socket.socket, home: Path) -> None:
    """While it hangs it says nothing."""
    config = StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")
    watched = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "30000000"}
    environment = daemon_environment(config) | watched
    with subprocess.Popen(daemon_command(config), env=environment) as daemon:
        try:
            ready = manager.recv(1000).decode()
            assert ready.splitlines() == ["READY=1", f"STATUS=serving {home}"]
            assert answers(home), "who is told that it is ready can connect"
            assert manager.recv(1000) == b"WATCHDOG=1"
            daemon.send_signal(signal.SIGSTOP)
            silent(manager, daemon.pid)
            daemon.send_signal(signal.SIGCONT)
            assert manager.recv(1000) == b"WATCHDOG=1"
            daemon.send_signal(signal.SIGTERM)
            while (said := manager.recv(1000)) == b"WATCHDOG=1":
                pass
            assert said == b"STOPPING=1"
            assert daemon.wait(PATIENCE_S) == 0
        finally:
            daemon.kill()


def silent(ear: socket.socket, pid: int) -> None:
    """Wait until the process is stopped; then nothing more may come."""
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    heard(ear)
    ear.settimeout(1.5)
    with pytest.raises(TimeoutError):
        ear.recv(1000)
    ear.settimeout(PATIENCE_S)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, []),
        ({"WATCHDOG_USEC": "1000"}, ["WATCHDOG=1"]),
        ({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid())}, ["WATCHDOG=1"]),
        ({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, []),
    ],
    ids=["no watchdog", "any process", "this process", "another process"],
)
def test_only_who_is_watched_says_that_it_lives(
    manager: socket.socket,
    variables: dict[str, str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ServiceManager().alive()
    assert heard(manager) == said


def test_what_it_starts_is_not_taken_for_it(
    manager: socket.socket, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an engine's daemon for the engine, nor the embedding process for the daemon."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    assert set(VARIABLES).isdisjoint(daemon_environment(StoreConfig(home=str(home))))
    ServiceManager()
    assert set(VARIABLES).isdisjoint(os.environ)


def test_a_name_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(f"\0kvshare-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@kvshare-test-{os.getpid()}")
        ServiceManager().ready("serving")
        assert heard(ear) == ["READY=1\nSTATUS=serving"]


def test_a_manager_that_does_not_listen_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with caplog.at_level(logging.WARNING, "kvshare"):
        ServiceManager().ready("serving")
    assert "does not hear" in caplog.text


def test_without_a_manager_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    ServiceManager().alive()
    assert not caplog.text
