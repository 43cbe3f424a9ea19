"""`kvshare serve`: a ROUTER socket in front of one Store.

The main thread only moves messages. Lookups, saves and chores run in threads of their own, so that
a long save never delays a plan, and a check delays neither.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import psutil
import zmq

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.chores import CHORES, do_chore
from kvshare_store.daemon.describe import list_nodes, show_node
from kvshare_store.daemon.spawn import answers
from kvshare_store.errors import (
    BusyError,
    DeadlineError,
    HomeError,
    InternalError,
    KVShareError,
    PlanError,
    ProtocolError,
)
from kvshare_store.store import Store
from kvshare_store.tree.edits import Tokens

log = logging.getLogger("kvshare")

_TICK_MS = 500
_SAVING = (protocol.Stage, protocol.Commit, protocol.Abandon, protocol.Flush, protocol.Clear)
_SESSIONS_KEPT = 4096


class Session(msgspec.Struct):
    """A client that said hello."""

    client: str
    pid: int


class Server:
    """Serves one Store until stopped."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._path = protocol.socket_path(config.home_path)
        self.store = Store(config)
        try:
            self._bind()
        except KVShareError:
            self.store.close()
            raise
        self._sessions: dict[bytes, Session] = {}
        self._clients: dict[str, int] = {}
        """Process id of each client that is not known to be dead."""
        self._answers: queue.Queue[list[bytes]] = queue.Queue()
        self._lookups = ThreadPoolExecutor(1, "kvshare-lookup")
        self._saves = ThreadPoolExecutor(1, "kvshare-save")
        self._chores = ThreadPoolExecutor(1, "kvshare-chore")
        self._stopping = False
        self._idle_since = time.monotonic()
        self._handlers: dict[type, Callable[[Any, Session], Any]] = {
            protocol.Plan: self._plan,
            protocol.Decline: lambda message, _: self.store.decline(message.reason, message.tokens),
            protocol.Finish: self._finish,
            protocol.Observe: self._observe,
            protocol.Working: lambda message, session: self.store.working(
                session.client, message.busy
            ),
            protocol.Stage: self._stage,
            protocol.Commit: lambda message, _: self.store.commit(message.staged),
            protocol.Abandon: lambda message, _: self.store.abandon(message.staged),
            protocol.Failed: lambda message, _: self.store.metrics.error(message.kind),
            protocol.Stats: lambda *_: self.store.stats(),
            protocol.Flush: lambda *_: self.store.flush(),
            protocol.ListNodes: lambda message, _: list_nodes(self.store, message.limit),
            protocol.ShowNode: lambda message, _: show_node(self.store, message.node),
            protocol.Clear: lambda *_: self.store.clear(),
            **dict.fromkeys(CHORES, lambda message, _: do_chore(self.store, message)),
            protocol.Stop: self._stop,
        }

    # --- sockets --------------------------------------------------------------------------------

    def _bind(self) -> None:
        """A socket only this user can reach. The home's lock says that nobody else serves it."""
        if self._path.exists() and answers(self._path):
            raise BusyError(f"socket {self._path} is in use by another process")
        self._path.unlink(missing_ok=True)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 200
        self._wake = self._context.socket(zmq.PULL)
        self._wake.bind("inproc://answers")
        before = os.umask(0o177)
        try:
            self._router.bind(f"ipc://{self._path}")
        except zmq.ZMQError as error:
            self._context.destroy()
            raise HomeError(f"socket {self._path} cannot be made: {error}") from error
        finally:
            os.umask(before)

    def serve(self) -> None:
        """Answer until a stop message, SIGTERM, SIGINT, or idleness; then close the store."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        reaped = time.monotonic()
        try:
            while not self._stopping:
                for ready, _ in poller.poll(_TICK_MS):
                    if ready is self._wake:
                        self._wake.recv()
                        self._router.send_multipart(self._answers.get())
                    else:
                        self._receive(self._router.recv_multipart())
                if time.monotonic() - reaped > 1.0:
                    reaped = time.monotonic()
                    self._reap()
                    self._exit_when_idle()
        finally:
            self.close()

    def close(self) -> None:
        """Finish what was accepted, then let go of socket and store."""
        self._lookups.shutdown()
        self._saves.shutdown()
        self._chores.shutdown()
        while not self._answers.empty():
            self._router.send_multipart(self._answers.get())
        self._router.close()
        self._wake.close()
        self._context.term()
        self._path.unlink(missing_ok=True)
        self.store.close()

    def stop(self, *_: object) -> None:
        """Stop at the next tick; safe in a signal handler."""
        self._stopping = True

    # --- messages -------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        if len(frames) != 3:
            return  # nobody who speaks this protocol
        peer, request_id, body = frames
        self._idle_since = time.monotonic()
        try:
            message = protocol.decode_request(body)
            if isinstance(message, protocol.Hello):
                self._send(peer, request_id, self._hello(peer, message))
                return
            session = self._sessions.get(peer)
            if session is None:
                raise ProtocolError("say hello first")
        except KVShareError as error:
            self._send(peer, request_id, error)
            return
        pool = self._saves if isinstance(message, _SAVING) else self._lookups
        if isinstance(message, CHORES):
            pool = self._chores
        pool.submit(self._answer, peer, request_id, message, session)

    def _answer(self, peer: bytes, request_id: bytes, message: Any, session: Session) -> None:
        """In a worker thread: the router socket belongs to the main thread, so replies queue."""
        try:
            result = self._handlers[type(message)](message, session)
        except KVShareError as error:
            result = error
        except Exception:  # a bug is logged and answered, or the client would wait
            log.exception("kvshare: %s failed", type(message).__name__)
            result = InternalError("the daemon failed on this request; see its log")
            self.store.metrics.error(result.kind)
        reply = [peer, request_id, _encoded(result)]
        self._answers.put(reply)
        self._waker().send(b"")

    def _waker(self) -> zmq.Socket[bytes]:
        local = _local
        if getattr(local, "context", None) is not self._context:
            local.context = self._context
            local.socket = self._context.socket(zmq.PUSH)
            local.socket.linger = 0
            local.socket.connect("inproc://answers")
        socket_: zmq.Socket[bytes] = local.socket
        return socket_

    def _send(self, peer: bytes, request_id: bytes, result: Any) -> None:
        self._router.send_multipart([peer, request_id, _encoded(result)])

    def _hello(self, peer: bytes, message: protocol.Hello) -> protocol.Welcome:
        if message.version != protocol.VERSION:
            raise ProtocolError(
                f"client speaks version {message.version}, daemon {protocol.VERSION}: "
                "run the same kvshare-store release on both sides"
            )
        if len(self._sessions) > _SESSIONS_KEPT:
            self._sessions.clear()  # whoever is alive says hello again
        self._sessions[peer] = Session(message.client, message.pid)
        self._clients[message.client] = message.pid
        return protocol.Welcome(
            protocol.VERSION,
            os.getpid(),
            str(self.store.blocks.host.arena.path),
            self.config.policy,
        )

    def _plan(self, message: protocol.Plan, session: Session) -> Any:
        if 0 < message.until < time.monotonic():
            raise DeadlineError("the engine has stopped waiting for this plan")
        tokens = _tokens(message.tokens)
        return self.store.plan(
            tokens, message.namespace, policy=message.policy, owner=session.client
        )

    def _finish(self, message: protocol.Finish, _: Session) -> None:
        self.store.finish(message.lease, message.outcome)

    def _observe(self, message: protocol.Observe, _: Session) -> None:
        self.store.observe(message.model, message.tokens, message.seconds)

    def _stage(self, message: protocol.Stage, session: Session) -> Any:
        tokens = _tokens(message.tokens)
        return self.store.stage(tokens, message.namespace, message.reuse, owner=session.client)

    def _stop(self, *_: object) -> None:
        self.stop()

    # --- housekeeping -----------------------------------------------------------------------------

    def _reap(self) -> None:
        """End what the dead hold, after everything that they had sent is done."""
        gone = {client for client, pid in self._clients.items() if pid and not _alive(pid)}
        self._sessions = {p: s for p, s in self._sessions.items() if s.client not in gone}
        for client in gone:
            del self._clients[client]
        self._saves.submit(self.store.reap, gone)

    def _exit_when_idle(self) -> None:
        if not self._path.exists():
            log.warning("kvshare: the socket is gone, exiting")
            self.stop()
            return
        limit = self.config.idle_exit_s
        if limit and not self._sessions and time.monotonic() - self._idle_since > limit:
            log.info("kvshare: no clients for %.0f s, exiting", limit)
            self.stop()
        return


_local = threading.local()


def _tokens(raw: bytes) -> Tokens:
    try:
        return np.frombuffer(raw, np.int32)
    except ValueError as error:
        raise PlanError(f"{len(raw)} bytes are no int32 tokens") from error


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not yet waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _encoded(result: Any) -> bytes:
    if isinstance(result, KVShareError):
        return protocol.encode(protocol.Reply(error=str(result.kind), message=str(result)))
    return protocol.encode(protocol.Reply(result=result))
