"""The engine's end of the daemon: never waits longer than told, brings a dead daemon back.

After a failure no plan is asked for during a pause that doubles up to half a minute; every request
in the meantime is a miss.
"""

from __future__ import annotations

import logging
import subprocess
import time

import msgspec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client, plan_request
from kvshare_store.daemon.spawn import ensure_daemon, spawn_daemon
from kvshare_store.errors import DeadlineError, KVShareError, ProtocolError, UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import ReusePlan
from kvshare_store.tree.edits import Tokens

log = logging.getLogger("kvshare")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class Link:
    """Plans without ever raising: what fails is None, counted by the caller as a miss."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.client = Client(config.home_path)
        self.failures: list[str] = []
        """Kinds of failures that the daemon has not been told of yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = _FIRST_PAUSE_S
        self._paused_until = 0.0

    def ask(self, tokens: Tokens, namespace: Namespace, policy: str | None) -> bytes | None:
        """Send a lookup; None while the daemon is given a rest."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            if not self.client.greeted:
                self.client.greet(self.config.plan_deadline_ms / 1e3)
                self._welcome_back()
            until = time.monotonic() + self.config.plan_deadline_ms / 1e3
            return self.client.send(plan_request(tokens, namespace, policy, until))
        except KVShareError as error:
            self._fail(error)
            return None

    def answer(self, request_id: bytes, seconds: float) -> ReusePlan | None:
        """The plan, or None if it failed; `DeadlineError` if it is not there after `seconds`."""
        try:
            reply = self.client.receive(request_id, seconds)
        except DeadlineError:
            raise
        except ProtocolError:
            self.client.reconnect()  # a restarted daemon: greeted with the next lookup
            return None
        except KVShareError as error:  # the daemon's own, or lost with an earlier session
            log.debug("kvshare: a lookup failed: %s", error)
            return None
        self._pause = _FIRST_PAUSE_S
        return msgspec.convert(reply, ReusePlan)

    def give_up(self, request_id: bytes) -> None:
        """The plan came too late for its request."""
        self.client.forget(request_id)
        self._fail(DeadlineError("the daemon did not plan in time"))

    def tell(self, message: protocol.Request) -> bool:
        """Send without wanting an answer; False, and lost, if the daemon is away."""
        if not self.client.greeted or time.monotonic() < self._paused_until:
            return False
        try:
            self.client.tell(message)
        except KVShareError as error:
            self._fail(error)
            return False
        return True

    def _welcome_back(self) -> None:
        while self.failures and self.tell(protocol.Failed(self.failures[0])):
            del self.failures[0]

    def _fail(self, error: KVShareError) -> None:
        if not self.failures:
            log.warning("kvshare: serving without reuse: %s", error)
        self.failures.append(str(error.kind))
        self._paused_until = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
        self.client.reconnect()
        self._revive()

    def _revive(self) -> None:
        """Start a daemon when ours has ended; one that merely is slow keeps the home's lock."""
        if self._process is not None and self._process.poll() is None:
            return
        try:
            self._process = spawn_daemon(self.config)
        except (OSError, KVShareError) as error:
            log.warning("kvshare: no daemon could be started: %s", error)

    def close(self) -> None:
        """Let go of the socket; the daemon stays."""
        self.client.close()


def open_link(config: StoreConfig, *, timeout: float = 30.0) -> Link:
    """A link to a daemon that answers, started if need be.

    A daemon that cannot be started is no reason to stop the engine: the link then keeps trying.
    """

    link = Link(config)
    try:
        ensure_daemon(config, timeout=timeout).close()
        link.client.greet(timeout)
    except (UnavailableError, DeadlineError) as error:
        log.warning("kvshare: serving without reuse for now: %s", error)
    except KVShareError:
        link.close()
        raise
    return link
