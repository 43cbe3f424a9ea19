"""Starting a daemon for a home where none answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import socket_path
from kvshare_store.errors import (
    BusyError,
    DeadlineError,
    HomeError,
    KVShareError,
    UnavailableError,
)

_spawned: list[subprocess.Popen[bytes]] = []
"""Children of this process; kept so that those that end are waited for."""


def spawn_daemon(config: StoreConfig) -> subprocess.Popen[bytes]:
    """Start `kvshare serve` with exactly this configuration, detached.

    Settings may hold secrets, so they travel in the environment, which only this user can read;
    the command line names the home, for whoever looks at the processes. What the daemon prints
    goes to `daemon.log` in the home. `HomeError` if the home cannot be written.
    """
    home = config.home_path
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = os.open(home / "daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise HomeError(
            f"home {home} cannot be used: {error.strerror}; choose another with --home"
        ) from error
    command = [sys.executable, "-m", "kvshare_store.cli.main", "serve", "--home", str(home)]
    _spawned[:] = [child for child in _spawned if child.poll() is None]
    try:
        child = subprocess.Popen(  # our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(config),
        )
    finally:
        os.close(log)
    _spawned.append(child)
    return child


def _environment(config: StoreConfig) -> dict[str, str]:
    """This process's environment with exactly these settings and no others."""
    names = {name: f"KVSHARE_{name.upper()}" for name in FIELDS}
    ours = {"KVSHARE_CONFIG", *names.values()}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    values = {names[name]: getattr(config, name) for name in FIELDS}
    return kept | {name: str(value) for name, value in values.items() if value is not None}


def answers(path: Path) -> bool:
    """Whether somebody accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def ensure_daemon(config: StoreConfig, *, timeout: float = 30.0) -> Client:
    """A greeted client; starts the daemon if none answers. `UnavailableError` when it cannot."""
    deadline = time.monotonic() + timeout
    path = socket_path(config.home_path)
    child: subprocess.Popen[bytes] | None = None
    while not answers(path):
        if child is None:
            child = spawn_daemon(config)
        elif child.poll() is not None and child.returncode != BusyError.exit_code:
            raise UnavailableError(_last_words(config.home_path))
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the daemon of {config.home_path} did not start in {timeout:.0f} s"
            )
        time.sleep(0.05)
    client = Client(config.home_path)
    try:
        client.greet()
    except KVShareError:
        client.close()
        raise
    return client


def _last_words(home: Path) -> str:
    log = home / "daemon.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return f"the daemon did not start: {lines[-1] if lines else 'no message'} (see {log})"
