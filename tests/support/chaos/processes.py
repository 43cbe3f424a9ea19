"""Daemons and clients that are to be killed. They are forked: see `tests.support.forking`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.address import answers
from kvshare_store.daemon.spawn import daemon_command, daemon_environment, open_log
from tests.support.chaos.namespaces import see_instead
from tests.support.forking import context, log_at_home, serve_here
from tests.support.power_cut import command

START_S = 60.0


class ChaosError(Exception):
    """The test itself cannot continue: a process hangs or does not start."""


class KilledDaemon:
    """The daemon of one home, in a process of its own. Call `start`, then `kill` or `end`.

    `other`: a folder that only this daemon sees at the path of its home.
    """

    def __init__(
        self, config: StoreConfig, environment: dict[str, str], other: Path | None = None
    ) -> None:
        self.config = config
        self._environment = environment
        self._other = other
        self._home = other or config.home_path
        self._process: ForkServerProcess | None = None

    def begin(self) -> None:
        """Start it; returns when it is about to open its home."""
        opening, child = multiprocessing.Pipe(duplex=False)
        self._process = context().Process(
            target=_serve,
            args=(self.config, self._environment, self._other, child),
            daemon=True,
        )
        self._process.start()
        child.close()
        with opening:
            if not opening.poll(START_S):
                raise ChaosError("no daemon could be started")

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self.begin()
        self.wait()

    def wait(self) -> None:
        """Wait until it accepts connections."""
        deadline = time.monotonic() + START_S
        while not answers(self._home):
            if self._process is None or not self._process.is_alive():
                raise ChaosError(f"the daemon did not start:\n{self.log()}")
            if time.monotonic() > deadline:
                raise ChaosError(f"the daemon does not answer:\n{self.log()}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL, which gives the process no chance to clean up."""
        if self._process is not None:
            self._process.kill()
            self._process.join(START_S)
            self._process = None

    def end(self) -> int:
        """SIGTERM; returns the exit code."""
        if self._process is None:
            raise ChaosError("there is no daemon to end")
        self._process.terminate()
        self._process.join(START_S)
        code, self._process = self._process.exitcode, None
        return -1 if code is None else code

    def log(self) -> str:
        """The end of its output."""
        path = self._home / "daemon.log"
        return path.read_text()[-4000:] if path.exists() else ""


def _serve(
    config: StoreConfig, environment: dict[str, str], other: Path | None, opening: Connection
) -> None:
    """`kvshare serve`, run in a forked child."""
    if other is not None:
        see_instead(config.home_path, other)
    log_at_home(config)
    opening.send(None)
    opening.close()
    whole = daemon_environment(config) | environment
    if other is not None:
        # threads that libraries began before see the other folder still; a new program has none
        program = daemon_command(config)
        os.execve(program[0], program, whole)
    serve_here(config, whole)


class RecordedDaemon:
    """Like `KilledDaemon`, but under strace; after the kill its system calls are in the file
    `recording`."""

    def __init__(self, config: StoreConfig, recording: Path) -> None:
        self._config = config
        self._recording = recording
        self._strace: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        home = self._config.home_path
        arguments = [*command(self._recording), *daemon_command(self._config)]
        log = open_log(home)
        try:
            environment = daemon_environment(self._config)
            self._strace = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
        finally:
            os.close(log)
        deadline = time.monotonic() + START_S
        while not answers(home):
            if self._strace.poll() is not None or time.monotonic() > deadline:
                raise ChaosError("no daemon could be started under strace")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL; strace writes the rest of the recording and ends."""
        if self._strace is None:
            return
        for child in psutil.Process(self._strace.pid).children():
            child.kill()
        self._strace.wait(START_S)
        self._strace = None


class Worker:
    """A client in a process of its own, and the pipe for its commands."""

    def __init__(self, target: Any, home: Path, *arguments: Any) -> None:
        self.pipe, child = multiprocessing.Pipe()
        self._process = context().Process(
            target=target, args=(str(home), child, *arguments), daemon=True
        )
        self._process.start()
        child.close()
        self.paused = False
        self.elsewhere = False
        """Whether it uses another home, so that its durable nodes are not in ours."""
        self.served = 0
        """Number of requests it was served."""

    def tell(self, command: str) -> None:
        """Send a command; ignored if the process has ended."""
        try:
            self.pipe.send(command)
        except OSError:
            self.paused = True

    def news(self) -> list[tuple[Any, ...]]:
        """Reports since the last call. A last report that a kill cut off is dropped."""
        found = []
        try:
            while self.pipe.poll(0):
                found.append(self.pipe.recv())
        except (EOFError, OSError):
            self.paused = True
        return found

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(START_S)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self._process.pid is not None and self.alive:
            os.kill(self._process.pid, number)

    def join(self) -> int | None:
        """Wait until it ends by itself; its exit code, or None if it does not end."""
        self._process.join(START_S)
        return self._process.exitcode

    def close(self) -> None:
        """End it, by SIGKILL if needed."""
        self.kill()
        self.pipe.close()
