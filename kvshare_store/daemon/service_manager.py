"""What the daemon tells whoever supervises it, by systemd's protocol (see sd_notify(3))."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

log = logging.getLogger("kvshare")

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Meant for the process that the manager started, not for what that starts."""


class ServiceManager:
    """Listens at `NOTIFY_SOCKET`. Without that variable nobody does, and nothing is said."""

    def __init__(self) -> None:
        environment = {name: os.environ.pop(name, "") for name in VARIABLES}
        path = environment["NOTIFY_SOCKET"]
        self._address = "\0" + path[1:] if path.startswith("@") else path
        for_us = environment["WATCHDOG_PID"] in {"", str(os.getpid())}
        self._watched = bool(environment["WATCHDOG_USEC"]) and for_us

    def ready(self, status: str) -> None:
        """Clients are served from now on; `status` is for people."""
        self._tell(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """Say so, if anybody ends daemons that do not."""
        if self._watched:
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """The end has begun."""
        self._tell("STOPPING=1")

    def _tell(self, message: str) -> None:
        """Never waits: a manager that does not listen must not hold up clients."""
        if not self._address:
            return
        try:
            with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as stream:
                stream.setblocking(False)
                stream.sendto(message.encode(), self._address)
        except OSError as error:
            log.warning("kvshare: the service manager does not hear: %s", error)
