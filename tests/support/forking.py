"""Processes that are forked from a server process that has done the slow imports.

A fresh daemon spends two seconds on imports, a forked one a fraction of that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.spawn import daemon_command, daemon_environment, open_log
from tests.support.network import Host, enter

IMPORTED_ONCE = ["__main__", "tests.support.chaos.worker", "tests.support.loaded"]


def context() -> ForkServerContext:
    """The server process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED_ONCE)
    return found


class ForkedDaemon:
    """`kvshare serve` for a configuration, in a forked process, with the methods of a `Popen`."""

    def __init__(self, config: StoreConfig, host: Host | None = None) -> None:
        arguments = (config, daemon_environment(config), host)
        self._process = context().Process(target=_serve_there, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid or 0

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code; fails when it does not end in time."""
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"process {self.pid} does not end"
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; ignored once it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _serve_there(config: StoreConfig, environment: Mapping[str, str], host: Host | None) -> None:
    if host is not None:
        enter(host.namespace)
    log_at_home(config)
    serve_here(config, environment)


def log_at_home(config: StoreConfig) -> None:
    """From now on this process prints into the daemon's log."""
    log = open_log(config.home_path)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.close(log)


def serve_here(config: StoreConfig, environment: Mapping[str, str]) -> None:
    """`kvshare serve` in this forked process; it does not return."""
    from kvshare_store.cli.main import main
    from tests.support.loaded import begin_lance

    os.environ.clear()
    os.environ.update(environment)
    begin_lance()
    _, _, _, *arguments = daemon_command(config)  # without Python and the module
    main(arguments)
