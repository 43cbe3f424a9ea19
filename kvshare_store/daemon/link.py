"""The engine's end of the daemon: waits for nothing but plans, and brings a dead daemon back.

A plan that comes late is its request's miss, and no more. A daemon whose connection is closed is
gone: it is started again. One that has answered nothing for several requests in a row hangs: it is
left alone for a pause that doubles up to half a minute, and every request meanwhile is a miss.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import msgspec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.address import answers, home_taken
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import Place, Remote, place_of
from kvshare_store.daemon.spawn import Spawned, ensure_daemon, spawn_daemon
from kvshare_store.errors import (
    DeadlineError,
    ErrorKind,
    KVShareError,
    OverloadError,
    UnavailableError,
)
from kvshare_store.plan import ReusePlan

log = logging.getLogger("kvshare")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_LATE_IN_A_ROW = 4
"""Plans that came late, with nothing heard of the daemon in between, before it counts as hung."""
_FAILURES_KEPT = 1000


class Link:
    """Plans without ever raising: what fails is None, counted by the caller as a miss."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.client = Client(place_of(config), role="engine")
        self.failures: list[str] = []
        """Kinds of failures that the daemon has not been told of yet."""
        self._busy = self._told_busy = False
        self._late = 0
        self._late_since = 0.0
        self.pause = _FIRST_PAUSE_S
        self.paused_until = 0.0
        self._reviver: Reviver | None = None

    def ask(self, question: protocol.Plan) -> bytes | None:
        """Send a lookup, until when it is waited for filled in; None while the daemon is given a
        rest, and for one too long to send."""
        tokens = len(question.tokens) // protocol.TOKEN_BYTES
        resting = time.monotonic() < self.paused_until
        if resting or not protocol.lookup_fits(question.namespace, tokens):
            return None
        if not self.client.remote:  # clocks of other machines differ
            until = time.monotonic() + self.config.plan_deadline_ms / 1e3
            question = msgspec.structs.replace(question, until=until)
        try:
            self.client.look()
            self._told_busy &= self.client.connected  # else a new connection is opened here
            request_id = self.client.send(question)
        except OverloadError as error:
            self._failed(error.kind)
            self._rest()
            return None
        except KVShareError as error:
            self._gone(error)
            return None
        self._tell_working()
        self._tell_failures()
        return request_id

    def answer(self, request_id: bytes, seconds: float) -> ReusePlan | None:
        """The plan, or None if it failed; `DeadlineError` if it is not there after `seconds`."""
        reply = self.reply(request_id, seconds)
        return None if reply is None else msgspec.convert(reply, ReusePlan)

    def question(self, message: protocol.Request) -> bytes | None:
        """Ask something else; None if the daemon is away. `reply` has the answer."""
        if not self.client.connected or time.monotonic() < self.paused_until:
            return None
        try:
            return self.client.send(message)
        except KVShareError as error:
            self._gone(error)
            return None

    def reply(self, request_id: bytes, seconds: float) -> Any:
        """The answer, or None if it failed; `DeadlineError` if it is not there after `seconds`."""
        try:
            reply = self.client.receive(request_id, seconds)
        except DeadlineError:
            raise
        except KVShareError as error:
            if not self.client.connected:
                self._gone(error)
            log.debug("kvshare: a request to the daemon failed: %s", error)
            return None
        self._well()
        return reply

    def forget(self, request_id: bytes) -> None:
        """Nobody wants that answer any more."""
        self.client.forget(request_id)

    def give_up(self, request_id: bytes) -> None:
        """The plan came too late for its request."""
        self.client.forget(request_id)
        self._failed(ErrorKind.TIMEOUT)
        if self.client.heard > self._late_since:
            self._late, self._late_since = 0, time.monotonic()
        self._late += 1
        if self._late >= _LATE_IN_A_ROW:
            self._rest()
            log.warning("kvshare: the daemon of %s hangs; serving without reuse", self.client.home)

    def tell(self, message: protocol.Request) -> bool:
        """Send without wanting an answer; False, and lost, if the daemon is away."""
        if not self.client.connected or time.monotonic() < self.paused_until:
            return False
        try:
            self.client.tell(message)
        except KVShareError as error:
            self._gone(error)
            return False
        return True

    def working(self, busy: bool) -> None:
        """Whether the engine has requests: meanwhile the daemon does nothing that can wait.

        Each daemon that the link connects to hears of it.
        """
        self._busy = busy
        self._tell_working()

    def _tell_working(self) -> None:
        if self._busy != self._told_busy and self.tell(protocol.Working(self._busy)):
            self._told_busy = self._busy

    def _tell_failures(self) -> None:
        while self.failures and self.tell(protocol.Failed(self.failures[0])):
            del self.failures[0]

    def _well(self) -> None:
        self._late, self.pause = 0, _FIRST_PAUSE_S

    def _failed(self, kind: str) -> None:
        if len(self.failures) < _FAILURES_KEPT:
            self.failures.append(str(kind))

    def _rest(self) -> None:
        self._late = 0
        self.paused_until = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, _LONGEST_PAUSE_S)

    def _gone(self, error: KVShareError) -> None:
        """Nobody is at the other end: start a daemon, unless one is starting or merely hangs. One
        of another machine is its operator's to start."""
        self._failed(error.kind)
        self._rest()
        self.client.reconnect()
        if self._reviver is None or self._reviver.done:
            what = "it is not ours to restart"
            if self.client.remote:
                what = "it is tried again"
            elif self.config.start_daemon:
                what = "this engine starts one"
            log.warning("kvshare: %s; %s, serving without reuse meanwhile", error, what)
            self._reviver = Reviver(self.config, self.client.home)

    def close(self) -> None:
        """Let go of the connection; the daemon stays."""
        self.client.close()
        if self._reviver is not None:
            self._reviver.join()


class Reviver:
    """Starts a daemon in a thread of its own: making a process takes time that the engine needs.
    For one of another machine it only asks again where that is, which may take time as well."""

    def __init__(self, config: StoreConfig, place: Place) -> None:
        self._config = config
        self._place = place
        self.spawned: Spawned | None = None
        self._thread = threading.Thread(target=self._run, name="kvshare-revive", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        home = self._config.home_path
        try:
            if isinstance(self._place, Remote):
                self._place.resolve()
                return
            wanted = self._config.start_daemon and not home_taken(home)
            if wanted and not answers(home):
                self.spawned = spawn_daemon(self._config)
        except (KVShareError, OSError) as error:
            log.warning("kvshare: no daemon could be reached or started: %s", error)

    @property
    def done(self) -> bool:
        """Whether another try makes sense: this one has failed, or its daemon has ended."""
        return not self._thread.is_alive() and (self.spawned is None or self.spawned.ended)

    def join(self) -> None:
        """Wait for the thread, which does not take long."""
        self._thread.join()
        if self.spawned is not None:
            self.spawned.close()


def open_link(config: StoreConfig, *, timeout: float = 30.0) -> Link:
    """A link to a daemon that answers, started if need be.

    A daemon that cannot be started is no reason to stop the engine: the link then keeps trying.
    """

    link = Link(config)
    try:
        if not link.client.remote:
            ensure_daemon(config, timeout=timeout).close()
        link.client.greet(timeout)
    except (UnavailableError, OverloadError, DeadlineError) as error:
        log.warning("kvshare: serving without reuse for now: %s", error)
    except KVShareError:
        link.close()
        raise
    return link
