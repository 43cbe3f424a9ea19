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
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import by_id, protocol, roles
from kvshare_store.daemon.address import Listener
from kvshare_store.daemon.chores import CHORES, do_chore
from kvshare_store.daemon.connection import Connection, Limits
from kvshare_store.daemon.lanes import Lanes
from kvshare_store.daemon.network import NetworkListener
from kvshare_store.daemon.outbox import Received
from kvshare_store.daemon.questions import QUESTIONS, answer
from kvshare_store.daemon.reloading import changed
from kvshare_store.daemon.rows import Inboxes, read_rows
from kvshare_store.daemon.switchboard import Door, Switchboard
from kvshare_store.daemon.tls import TlsStream
from kvshare_store.daemon.wire import Frame
from kvshare_store.errors import (
    DeadlineError,
    DeniedError,
    HomeError,
    InternalError,
    KVShareError,
    PlanError,
    ProtocolError,
    UnavailableError,
)
from kvshare_store.logs import log_as_json, log_as_text
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import ReusePlan
from kvshare_store.store import Store

log = logging.getLogger("kvshare")

_INBOX_SHARE = 4
"""Rows that other machines send may take this part of `host_bytes` before they are saved."""
_TICK_S, _REST_S = 0.5, 0.1
_INSIDE = "inside"
"""Whoever asks from this process, as one client of the lanes."""
_WRITING = (protocol.Commit, protocol.Clear, *CHORES)
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
    ) -> None:
        """`reread`: the settings as they are now, for `reload`."""
        self.config = config
        self._reread = reread
        self._wants_reload = False
        self._drained_by = float("inf")
        """When a daemon that drains ends, whatever is held then."""
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
        self._inboxes = Inboxes(config.host_bytes // _INBOX_SHARE)
        self._lanes = Lanes(self._failed)
        self._stopping = self._homeless = False
        self._reaping = False
        self._beside: list[Beside] = []
        self._started = self._idle_since = self._tended = time.monotonic()
        self._handlers: dict[type, Callable[[Any, Any], Any]] = {
            protocol.Decline: lambda message, _: self.store.decline(message.reason, message.tokens),
            protocol.EngineCached: lambda message, _: self.store.engine_cached(message.tokens),
            protocol.Settings: lambda *_: self.config,
            protocol.Finish: lambda message, _: self.store.finish(message.lease, message.outcome),
            protocol.Observe: self._observe,
            protocol.Working: lambda message, client: self.store.working(
                client.owner, message.busy
            ),
            protocol.Stage: self._stage,
            protocol.ReadRows: lambda message, _: read_rows(self.store, message),
            protocol.WriteRows: lambda message, client: self._inboxes.write(
                self.store, client, message
            ),
            protocol.Commit: self._commit,
            protocol.Abandon: self._abandon,
            protocol.Failed: lambda message, _: self.store.metrics.error(message.kind),
            protocol.Stats: lambda *_: self._stats(),
            protocol.Flush: lambda _, client: self.store.flush(owner=client.owner),
            **dict.fromkeys(QUESTIONS, lambda message, _: answer(self.store, message)),
            protocol.HasNodes: lambda message, _: by_id.has_nodes(
                self.store, message.nodes, use=message.use
            ),
            protocol.PlanNode: self._plan_node,
            protocol.Forget: lambda message, _: by_id.forget(self.store, message.nodes),
            protocol.Held: lambda message, _: by_id.held(self.store, message.model),
            protocol.NodesOf: lambda message, _: by_id.nodes_of(
                self.store, message.namespace, message.after, message.limit
            ),
            protocol.Clear: lambda *_: self.store.clear(),
            **dict.fromkeys(CHORES, self._chore),
        }

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
        if not isinstance(message, CHORES):
            return msgspec.to_builtins(self._handlers[type(message)](message, None))
        self._check_home()
        found = do_chore(self.store, message, lambda: given_up() or self._stopping)
        return msgspec.to_builtins(found)

    # --- the main thread -------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer until a stop message, SIGTERM, SIGINT, or idleness; then close the store."""
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
        if self._wants_reload:
            self._wants_reload = False
            self._lanes.run("chore", self._reload)
        if self._drained_by != float("inf"):
            held, late = self.store.held, time.monotonic() >= self._drained_by
            if held and late:
                log.warning("kvshare: ending although %d leases and saves have not", held)
            self._stopping |= late or not held

    def _reload(self) -> None:
        """What is wrong, or cannot change, changes nothing."""
        try:
            asked = self.config if self._reread is None else self._reread()
            if self._network is not None:  # certificates and roles may have changed
                self._network.reload(self.config)
        except KVShareError as error:
            self.store.metrics.error(error.kind)
            log.error("kvshare: the settings stay as they are: %s", error)
            return
        change = changed(self.config, asked)
        if change.config.log_format != self.config.log_format:
            (log_as_json if change.config.log_format == "json" else log_as_text)()
        self.config = change.config
        self.store.reload(change.config)
        log.info("kvshare: %s", change.told)

    def close(self) -> None:
        """Finish what is being done, drop what has not begun, let go of socket and store.

        What was committed becomes durable, unless the home is gone or somebody else's.
        """
        self._stopping = True
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
            connection.role = self._network.role_of(connection.stream)
        connection.role = roles.lesser(connection.role, message.role)
        arena, policy = self.store.blocks.host.arena, self.config.policy
        welcome = protocol.Welcome(version, os.getpid(), arena.id, policy, connection.role)
        descriptor = -1 if connection.remote else arena.descriptor
        return protocol.encode(protocol.Reply(result=welcome)), descriptor

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
        self._inboxes.clear(connection)

    # --- in the lanes ------------------------------------------------------------------------

    def _answer(self, connection: Connection, frame: Frame, came: float) -> None:
        self._settle(connection, frame, partial(self._result, connection, frame, came))

    def _result(self, connection: Connection, frame: Frame, came: float) -> Any:
        message = protocol.decode_request(frame.body)
        if isinstance(message, protocol.Plan):
            return self._plan(message, connection, came)
        if isinstance(message, _WRITING):
            self._check_home()
        return self._handlers[type(message)](message, connection)

    def _check_home(self) -> None:
        if not self._listener.in_place:
            raise HomeError(f"home {self.config.home_path} was removed or replaced")

    def _settle(self, connection: Connection, frame: Frame, result: Callable[[], Any]) -> None:
        """Answer with a result, or with the error that comes instead; a future later."""
        try:
            found = result()
            if isinstance(found, Future):
                found.add_done_callback(lambda it: self._settle(connection, frame, it.result))
                return
            body = _encoded(found)
        except KVShareError as error:
            body = protocol.encode_error(error)
        except BaseException as error:  # a bug is logged and answered, or the client would wait
            log.exception("kvshare: a request failed")
            self._failed(error)
            body = protocol.encode_error(
                InternalError("the daemon failed on this request; see its log")
            )
        self.switchboard.answer(connection, frame.id, body, frame.nbytes)

    def _failed(self, _: BaseException) -> None:
        self.store.metrics.error(InternalError.kind)

    def _plan(self, message: protocol.Plan, client: Connection, came: float) -> Any:
        """`came`: when the request arrived (monotonic seconds)."""
        now, tokens, space = time.monotonic(), _tokens(message.tokens), message.namespace
        if client.gone or (0 < message.until < now and not client.remote):
            raise DeadlineError("the engine has stopped waiting for this plan")
        if now - came > self.config.plan_deadline_ms / 1e3:
            self.store.decline("late", len(tokens))
            return ReusePlan(namespace=space.digest, tokens=len(tokens), declined="late")
        return self.store.plan_soon(
            tokens,
            space,
            policy=message.policy,
            owner=client.owner,
            request=message.request,
            far=client.remote,
        )

    def _plan_node(self, message: protocol.PlanNode, client: Connection) -> Any:
        left_ms = self.config.plan_deadline_ms
        if message.until and not client.remote:
            left_ms = min((message.until - time.monotonic()) * 1e3, left_ms)
        if client.gone or not left_ms >= 0:  # nor where it is no number
            raise DeadlineError("the client has stopped waiting for these rows")
        return self.store.plan_node(
            message.node, owner=client.owner, deadline_ms=left_ms, far=client.remote
        )

    def _chore(self, message: Any, client: Connection) -> Any:
        return do_chore(self.store, message, lambda: client.gone or self._stopping)

    def _observe(self, message: protocol.Observe, client: Connection) -> None:
        self.store.observe(message.model, message.tokens, message.seconds, far=client.remote)

    def _stage(self, message: protocol.Stage, client: Connection) -> Any:
        self._inboxes.clear(client)
        return self.store.stage(
            _tokens(message.tokens),
            message.namespace,
            message.reuse,
            owner=client.owner,
            extends=message.extends,
        )

    def _commit(self, message: protocol.Commit, client: Connection) -> str | None:
        try:
            return self.store.commit(message.staged, Received(client.outbox))
        finally:
            self._inboxes.clear(client)

    def _abandon(self, message: protocol.Abandon, client: Connection) -> None:
        self._inboxes.clear(client)
        self.store.abandon(message.staged)

    def _stats(self) -> dict[str, Any]:
        board = self.switchboard
        return self.store.stats() | {
            "daemon": {
                "pid": os.getpid(),
                "seconds": time.monotonic() - self._started,
                "connections": len(board.connections),
                "requests": board.under_way,
                "cut_off": board.cut_off,
                "draining": self._drained_by != float("inf"),
            }
        }


def _tokens(raw: bytes) -> Tokens:
    try:
        return np.frombuffer(raw, np.int32)
    except ValueError as error:
        raise PlanError(f"{len(raw)} bytes are no int32 tokens") from error


def _is_memory(descriptor: int) -> bool:
    """Whether reading from the descriptor never waits: only memory files have seals."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) >= 0
    except OSError:
        return False


def _encoded(result: Any) -> bytes:
    return protocol.encode(protocol.Reply(result=result))
