"""Starts a daemon for a home if none answers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.daemon import service_manager
from kvshare_store.daemon.address import answers, home_taken
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import place_of
from kvshare_store.errors import DeadlineError, HomeError, KVShareError, UnavailableError

_POLL_S = 0.05
_LAUNCH = (
    "import os, sys\n"
    "pid = os.fork()\n"
    "if pid:\n"
    "    print(pid)\n"
    "else:\n"
    "    os.dup2(2, 1)\n"  # nobody waits for the end of our standard output
    "    os.setsid()\n"
    "    os.execv(sys.argv[1], sys.argv[1:])\n"
)
"""A program that runs a command as nobody's child: it ends at once, and init adopts the command."""


class Spawned:
    """A started daemon that is nobody's child: whoever started it may end before it does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = -1

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._handle < 0 or bool(select.select([self._handle], [], [], 0)[0])

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a daemon that has ended ignores it."""
        if not self.ended:
            signal.pidfd_send_signal(self._handle, number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended after at most `seconds`."""
        return self._handle < 0 or bool(select.select([self._handle], [], [], seconds)[0])

    def close(self) -> None:
        """Close the handle; the daemon lives on."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def daemon_command(config: StoreConfig) -> list[str]:
    """The command; its arguments name the home for whoever lists the processes."""
    module = ["-m", "kvshare_store.cli", "serve", "--home", str(config.home_path)]
    return [sys.executable, *module]


def spawn_daemon(config: StoreConfig) -> Spawned:
    """Start `kvshare serve` with exactly this configuration, as nobody's child.

    It is no descendant of this process, so whoever ends an engine with all its children leaves the
    daemon to the other engines. Settings may hold secrets, so they travel in the environment, which
    only this user can read. What the daemon prints goes to `daemon.log` in the home. `HomeError` if
    the home cannot be written.
    """
    log = open_log(config.home_path)
    try:
        launched = subprocess.run(  # our own interpreter and module
            [sys.executable, "-I", "-S", "-c", _LAUNCH, *daemon_command(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=daemon_environment(config),
            check=True,
        )
        return Spawned(int(launched.stdout))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UnavailableError(f"no daemon could be started: {error}") from error
    finally:
        os.close(log)


def open_log(home: Path) -> int:
    """Descriptor of the file that a daemon prints to; makes the home where there is none."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(home / "daemon.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise HomeError(
            f"home {home} cannot be used: {error.strerror}; choose another with --home"
        ) from error


def daemon_environment(config: StoreConfig) -> dict[str, str]:
    """This process's environment with exactly these settings and no others."""
    names = {name: f"KVSHARE_{name.upper()}" for name in FIELDS}
    ours = {"KVSHARE_CONFIG", *service_manager.VARIABLES, *names.values()}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    values = {names[name]: getattr(config, name) for name in FIELDS}
    return kept | {name: str(value) for name, value in values.items() if value is not None}


def ensure_daemon(config: StoreConfig, *, timeout: float = 30.0) -> Client:
    """A greeted client; starts the daemon if none answers. `UnavailableError` when it cannot.

    With `start_daemon` off it waits for somebody else's: `DeadlineError` if none comes.
    """
    deadline = time.monotonic() + timeout
    client = Client(place_of(config))
    try:
        if not client.remote:
            _until_connected(config, deadline)
        client.greet(max(0.0, deadline - time.monotonic()))
    except KVShareError:
        client.close()
        raise
    return client


def _until_connected(config: StoreConfig, deadline: float) -> None:
    home, spawned = config.home_path, None
    try:
        while not answers(home):
            if home_taken(home) or not config.start_daemon:
                pass  # another daemon is starting or ending there: ours could only fail
            elif spawned is None:
                spawned = spawn_daemon(config)
            elif spawned.ended:
                raise UnavailableError(_last_words(home))
            if time.monotonic() > deadline:
                raise DeadlineError(f"the daemon of {home} did not start in time")
            time.sleep(_POLL_S)
    finally:
        if spawned is not None:
            spawned.close()


def _last_words(home: Path) -> str:
    log = home / "daemon.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return f"the daemon did not start: {lines[-1] if lines else 'no message'} (see {log})"
