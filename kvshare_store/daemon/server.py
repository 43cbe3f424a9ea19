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
from kvshare_store.daemon import by_id, protocol
from kvshare_store.daemon.address import Listener
from kvshare_store.daemon.chores import CHORES, do_chore
from kvshare_store.daemon.connection import Connection, Limits
from kvshare_store.daemon.lanes import Lanes
from kvshare_store.daemon.outbox import Received
from kvshare_store.daemon.questions import QUESTIONS, answer
from kvshare_store.daemon.service_manager import ServiceManager
from kvshare_store.daemon.switchboard import Switchboard
from kvshare_store.daemon.wire import Frame
from kvshare_store.errors import (
    DeadlineError,
    HomeError,
    InternalError,
    KVShareError,
    PlanError,
    ProtocolError,
    UnavailableError,
)
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import ReusePlan
from kvshare_store.store import Store

log = logging.getLogger("kvshare")

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

    def __init__(self, config: StoreConfig, limits: Limits | None = None) -> None:
        self.config = config
        self._manager = ServiceManager()
        self.store = Store(config)
        try:
            self._listener = Listener(config.home_path)
        except KVShareError:
            self.store.close()
            raise
        self.switchboard = Switchboard(self._listener, self, limits or Limits())
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
            protocol.NextLook: lambda message, client: self.store.next_look(
                client.owner, message.namespaces
            ),
            protocol.Looked: lambda message, client: self.store.looked(
                client.owner, message.node, message.stamp, message.end
            ),
            protocol.Stage: self._stage,
            protocol.Commit: self._commit,
            protocol.Abandon: lambda message, _: self.store.abandon(message.staged),
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
        self._manager.ready(f"serving {self.config.home_path}")
        try:
            while not self._stopping:
                if self._turn():
                    self._idle_since = time.monotonic()
                if time.monotonic() - self._tended > 1.0:
                    self._tended = time.monotonic()
                    self._tend()
        finally:
            self.close()

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
        arena = self.store.blocks.host.arena
        welcome = protocol.Welcome(version, os.getpid(), arena.id, self.config.policy)
        return protocol.encode(protocol.Reply(result=welcome)), arena.descriptor

    def request(self, connection: Connection, frame: Frame) -> None:
        """Give a request to its lane."""
        kind = protocol.kind_of(frame.body)
        if self._stopping:
            raise UnavailableError("the daemon is ending")
        if kind is protocol.Hello:
            raise ProtocolError("hello was said already")
        if kind is protocol.Stop:
            self.switchboard.answer(connection, frame.id, _encoded(None), frame.nbytes)
            self.stop()
            return
        work = partial(self._answer, connection, frame, time.monotonic())
        self._lanes.submit(connection.owner, kind, work)

    def left(self, connection: Connection) -> None:
        """End what a client held, after all that it had sent is done."""
        if not self._stopping:
            self._lanes.run("save", partial(self.store.reap, {connection.owner}))

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
        if client.gone or 0 < message.until < now:
            raise DeadlineError("the engine has stopped waiting for this plan")
        if now - came > self.config.plan_deadline_ms / 1e3:
            self.store.decline("late", len(tokens))
            return ReusePlan(namespace=space.digest, tokens=len(tokens), declined="late")
        return self.store.plan_soon(
            tokens, space, policy=message.policy, owner=client.owner, request=message.request
        )

    def _plan_node(self, message: protocol.PlanNode, client: Connection) -> Any:
        left_ms = self.config.plan_deadline_ms
        if message.until:
            left_ms = min((message.until - time.monotonic()) * 1e3, left_ms)
        if client.gone or not left_ms >= 0:  # nor where it is no number
            raise DeadlineError("the client has stopped waiting for these rows")
        return self.store.plan_node(message.node, owner=client.owner, deadline_ms=left_ms)

    def _chore(self, message: Any, client: Connection) -> Any:
        return do_chore(self.store, message, lambda: client.gone or self._stopping)

    def _observe(self, message: protocol.Observe, _: Connection) -> None:
        self.store.observe(message.model, message.tokens, message.seconds)

    def _stage(self, message: protocol.Stage, client: Connection) -> Any:
        return self.store.stage(
            _tokens(message.tokens),
            message.namespace,
            message.reuse,
            owner=client.owner,
            extends=message.extends,
        )

    def _commit(self, message: protocol.Commit, client: Connection) -> str | None:
        return self.store.commit(message.staged, Received(client.outbox))

    def _stats(self) -> dict[str, Any]:
        board = self.switchboard
        return self.store.stats() | {
            "daemon": {
                "pid": os.getpid(),
                "seconds": time.monotonic() - self._started,
                "connections": len(board.connections),
                "requests": board.under_way,
                "cut_off": board.cut_off,
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
