"""`kvshare serve`: one Store, and everybody who is connected to its socket.

The main thread moves messages (`switchboard`); lanes of threads answer them. docs/design/daemon.md
says what a client may take, and what happens on each kind of ending.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import msgspec

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol, roles
from kvshare_store.daemon.address import Listener
from kvshare_store.daemon.connection import Connection, Limits
from kvshare_store.daemon.handling import Handling
from kvshare_store.daemon.lanes import Lanes
from kvshare_store.daemon.network import NetworkListener
from kvshare_store.daemon.reloading import changed, files_of, nothing_named, wait_until_written
from kvshare_store.daemon.service_manager import ServiceManager
from kvshare_store.daemon.switchboard import Door, Switchboard
from kvshare_store.daemon.tls import TlsStream
from kvshare_store.daemon.wire import Frame
from kvshare_store.errors import (
    DeadlineError,
    DeniedError,
    HomeError,
    InternalError,
    KVShareError,
    ProtocolError,
    UnavailableError,
)
from kvshare_store.lookup.steering import bound_text
from kvshare_store.observability.logs import Seldom, log_process_as
from kvshare_store.store import Store

log = logging.getLogger("kvshare")

_TICK_S, _REST_S = 0.5, 0.1
_INSIDE = "inside"
"""Whoever asks from this process, as one client of the lanes."""
_DRAIN_S = 10.0
"""How long a stopping daemon waits for what it is doing for clients."""


class Beside(Protocol):
    """A part that serves others beside the socket, in threads of its own."""

    def close(self) -> None:
        """End; answers nobody any more."""


class Server:
    """Serves one Store until stopped."""

    def __init__(
        self,
        config: StoreConfig,
        limits: Limits | None = None,
        reread: Callable[[], StoreConfig] | None = None,
        file: str = "",
    ) -> None:
        """`reread`: the settings as they are now, for `reload`; None: no file of them is named.
        `file`: that file."""
        self.config = config
        self._reread = reread
        self._file = file
        self._wants_reload = self._reload_waits = False
        self._drained_by = float("inf")
        """When a daemon that drains ends, whatever is held then."""
        self._manager = ServiceManager()
        self._network = NetworkListener(config) if config.listen else None
        try:
            self.store = Store(config)
        except BaseException:
            self._close_network()
            raise
        try:
            self._listener = Listener(config.home_path)
        except KVShareError:
            self.store.close()
            self._close_network()
            raise
        doors: list[Door] = [self._listener]
        if self._network is not None:
            doors.append(self._network)
        self.switchboard = Switchboard(doors, self, limits or Limits())
        self.handling = Handling(self.store, self._stats, self._check_home)
        self._lanes = Lanes(self._failed)
        self._stopping = self._homeless = False
        self._reaping = False
        self._seldom = Seldom(log)
        self._beside: list[Beside] = []
        self._started = self._idle_since = self._tended = time.monotonic()

    # --- for parts of this process, in any thread ------------------------------------------------

    def attach(self, part: Beside) -> None:
        """Close a part that asks this server first of all when the daemon ends."""
        self._beside.append(part)

    def ask(self, message: Any, given_up: Callable[[], bool] = lambda: False) -> Future[Any]:
        """The answer to a question or a chore as a client would get it: in its lane, when it is its
        turn. `given_up`: whether nobody wants it any more. `UnavailableError` once it ends."""
        if self._stopping:
            raise UnavailableError("the daemon is ending")
        question = partial(self._inside, message, given_up)
        return self._lanes.ask(_INSIDE, type(message), question)

    def _inside(self, message: Any, given_up: Callable[[], bool]) -> Any:
        if given_up():
            raise DeadlineError("nobody wants this answer any more")
        found = self.handling.answer(
            message, None, time.monotonic(), lambda: given_up() or self._stopping
        )
        return msgspec.to_builtins(found)

    # --- the main thread -------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer until a stop message, SIGTERM, SIGINT, or idleness; then close the store."""
        self._manager.ready(f"serving {self.config.home_path}")
        if told := bound_text(self.config):
            log.info("kvshare: %s", told)
        try:
            while not self._stopping:
                if self._turn():
                    self._idle_since = time.monotonic()
                self._heed_signals()
                if time.monotonic() - self._tended > 1.0:
                    self._tended = time.monotonic()
                    self._tend()
        finally:
            self.close()

    @property
    def port(self) -> int:
        """Where it listens to other machines; 0 if it does not."""
        return self._network.port if self._network is not None else 0

    def _close_network(self) -> None:
        if self._network is not None:
            self._network.close()

    def _turn(self) -> bool:
        """A turn of the switchboard; an error in it must not end the daemon."""
        try:
            return self.switchboard.turn(_TICK_S)
        except Exception as error:
            log.exception("kvshare: the loop that moves messages failed and goes on")
            self.store.metrics.health.failed("kvshare-main", error)
            time.sleep(_REST_S)
            return False

    def stop(self, *_: object) -> None:
        """Stop soon; safe in a signal handler."""
        self._stopping = True
        self.switchboard.wake()

    def drain(self, *_: object) -> None:
        """Stop once leases and saves have ended, or after `drain_seconds`; at once if that was said
        before. Safe in a signal handler."""
        self._stopping |= self._drained_by != float("inf")
        self._drained_by = time.monotonic() + self.config.drain_seconds
        self.store.drain()
        self.switchboard.wake()

    def reload(self, *_: object) -> None:
        """Read the settings again soon; safe in a signal handler."""
        self._wants_reload = True
        self.switchboard.wake()

    def _heed_signals(self) -> None:
        if self._wants_reload and not self._reload_waits:  # one that waits does for all
            self._wants_reload, self._reload_waits = False, True
            self._lanes.run("reload", self._reload)
        if self._drained_by != float("inf"):
            held, late = self.store.held, time.monotonic() >= self._drained_by
            if held and late:
                log.warning("kvshare: ending although %d leases and saves have not", held)
            self._stopping |= late or not held

    def _reload(self) -> None:
        self._reload_waits = False
        self.reload_now()

    def reload_now(self) -> None:
        """Read the settings again; what is wrong, or cannot change, changes nothing."""
        try:
            wait_until_written(files_of(self.config, self._file))
            asked = None if self._reread is None else self._reread()
            if self._network is not None:  # certificates and roles may have changed
                self._network.reload(self.config)
            change = changed(self.config, self.config if asked is None else asked)
            self.store.reload(change.config)
        except KVShareError as error:
            self.store.metrics.error(error.kind)
            log.error("kvshare: the settings stay as they are: %s", error)
            return
        if asked is None:
            more = self._network is not None or bool(self.config.tenant_limits)
            log.warning("kvshare: %s", nothing_named(more=more))
            return
        if change.config.log_format != self.config.log_format:
            log_process_as(change.config.log_format)
        self.config = change.config
        log.info("kvshare: %s", change.told)

    def close(self) -> None:
        """Finish what is being done, drop what has not begun, let go of socket and store.

        What was committed becomes durable, unless the home is gone or somebody else's.
        """
        self._stopping = True
        self._manager.stopping()
        self.switchboard.stop_listening()
        for part in self._beside:
            part.close()
        if not self._lanes.close(_DRAIN_S, partial(self.switchboard.turn, 0.0)):
            log.warning("kvshare: stopping although some requests have not ended")
        self.switchboard.close()
        if not self._homeless:
            self.store.close()

    def _tend(self) -> None:
        """Once a second: leases that have run out, and reasons to end."""
        self._manager.alive()
        if not self._reaping:
            self._reaping = True
            self._lanes.run("save", self._reap)
        if not self._listener.in_place:
            log.warning("kvshare: the home was removed or replaced, exiting; nothing is written")
            self._homeless = True
            self.stop()
        limit = self.config.idle_exit_s
        idle = time.monotonic() - self._idle_since
        if limit and not self.switchboard.connections and idle > limit:
            log.info("kvshare: no clients for %.0f s, exiting", limit)
            self.stop()

    def _reap(self) -> None:
        try:
            self.store.reap()
            self.handling.inboxes.reap(self.store, self.config.lease_seconds)
        finally:
            self._reaping = False

    # --- what the switchboard asks; nothing here may wait ---------------------------------------

    def hello(self, connection: Connection, body: bytes) -> tuple[bytes, int]:
        """Let a client in."""
        if protocol.kind_of(body) is not protocol.Hello:
            raise ProtocolError("say hello first")
        message = protocol.decode_request(body)
        assert isinstance(message, protocol.Hello)
        version = protocol.common_version(message)
        if connection.outbox >= 0 and not _is_memory(connection.outbox):
            raise ProtocolError("the descriptor that came with the hello is no memory file")
        if self._network is not None and isinstance(connection.stream, TlsStream):
            connection.role = self._role_of(connection.stream, self._network)
        connection.role = roles.lesser(connection.role, message.role)
        arena, policy = self.store.blocks.host.arena, self.config.policy
        welcome = protocol.Welcome(version, os.getpid(), arena.id, policy, connection.role)
        descriptor = -1 if connection.remote else arena.descriptor
        return protocol.encode(protocol.Reply(result=welcome)), descriptor

    def _role_of(self, stream: TlsStream, network: NetworkListener) -> protocol.Role:
        try:
            return network.role_of(stream)
        except DeniedError as error:
            self._seldom.warn("refused", f"a client was refused: {error}")
            raise

    def request(self, connection: Connection, frame: Frame) -> None:
        """Give a request to its lane."""
        kind = protocol.kind_of(frame.body)
        if self._stopping:
            raise UnavailableError("the daemon is ending")
        if kind is protocol.Hello:
            raise ProtocolError("hello was said already")
        self._check_role(kind, connection)
        if kind is protocol.Stop:
            message = protocol.decode_request(frame.body)
            self.switchboard.answer(connection, frame.id, _encoded(None), frame.nbytes)
            (self.drain if isinstance(message, protocol.Stop) and message.drain else self.stop)()
            return
        work = partial(self._answer, connection, frame, time.monotonic())
        self._lanes.submit(connection.owner, kind, work)

    def _check_role(self, kind: type, connection: Connection) -> None:
        try:
            roles.check(kind, connection.role)
        except DeniedError as error:
            self.store.metrics.error(error.kind)
            raise

    def left(self, connection: Connection) -> None:
        """End what a client held, after all that it had sent is done."""
        if not self._stopping:
            self._lanes.run("save", partial(self.store.reap, {connection.owner}))
        self.handling.inboxes.clear(connection)

    # --- in the lanes ------------------------------------------------------------------------

    def _answer(self, connection: Connection, frame: Frame, came: float) -> None:
        self._settle(connection, frame, partial(self._result, connection, frame, came))

    def _result(self, connection: Connection, frame: Frame, came: float) -> Any:
        message = protocol.decode_request(frame.body)
        return self.handling.answer(
            message, connection, came, lambda: connection.gone or self._stopping
        )

    def _check_home(self) -> None:
        if not self._listener.in_place:
            raise HomeError(f"home {self.config.home_path} was removed or replaced")

    def _settle(self, connection: Connection, frame: Frame, result: Callable[[], Any]) -> None:
        """Answer with a result, or with the error that comes instead; a future later."""
        malformed = False
        try:
            found = result()
            if isinstance(found, Future):
                found.add_done_callback(lambda it: self._settle(connection, frame, it.result))
                return
            body = _encoded(found)
        except KVShareError as error:
            body, malformed = protocol.encode_error(error), isinstance(error, ProtocolError)
        except BaseException as error:  # a bug is logged and answered, or the client would wait
            log.exception("kvshare: a request failed")
            self._failed(error)
            body = protocol.encode_error(
                InternalError("the daemon failed on this request; see its log")
            )
        self.switchboard.answer(connection, frame.id, body, frame.nbytes, malformed=malformed)

    def _failed(self, _: BaseException) -> None:
        self.store.metrics.error(InternalError.kind)

    def _stats(self) -> dict[str, Any]:
        board = self.switchboard
        return self.store.stats() | {
            "daemon": {
                "pid": os.getpid(),
                "seconds": time.monotonic() - self._started,
                "connections": len(board.connections),
                "requests": board.under_way,
                "waiting": self._lanes.waiting(),
                "cut_off": board.cut_off,
                "draining": self._drained_by != float("inf"),
            }
        }


def _is_memory(descriptor: int) -> bool:
    """Whether reading from the descriptor never waits: only memory files have seals."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) >= 0
    except OSError:
        return False


def _encoded(result: Any) -> bytes:
    return protocol.encode(protocol.Reply(result=result))
