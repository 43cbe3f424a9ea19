"""A client of the daemon. One thread, one client; calls end by their deadline, always."""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from kvshare_store.blocks.arena import Arenas
from kvshare_store.daemon import protocol
from kvshare_store.errors import (
    DeadlineError,
    ProtocolError,
    UnavailableError,
    error_for,
)
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.staging import Reuse, Slot, Staged
from kvshare_store.tree.edits import Tokens, as_tokens

T = TypeVar("T")

_PATIENCE_S = 10.0


class Client:
    """Talks to the daemon of one home. `UnavailableError` when none is there.

    A daemon that was restarted is greeted anew by itself; `DeadlineError` when it does not answer
    in time.
    """

    def __init__(self, home: str | Path, *, timeout: float = _PATIENCE_S) -> None:
        self.home = Path(home).expanduser()
        self.name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._timeout = timeout
        self._ids = itertools.count(1)
        self._waiting: set[bytes] = set()
        self._answers: dict[bytes, protocol.Reply] = {}
        self.arenas = Arenas()
        # the process's own: a private context waits for its sockets when it is collected
        self._context: zmq.Context[Any] = zmq.Context.instance()
        self._connect()

    def _connect(self) -> None:
        self.greeted = False
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(f"ipc://{protocol.socket_path(self.home)}")

    def reconnect(self) -> None:
        """Forget what is in flight and start a new session."""
        self._socket.close()
        self._waiting.clear()
        self._answers.clear()
        self._connect()

    # --- requests -----------------------------------------------------------------------------

    def send(self, message: protocol.Request) -> bytes:
        """Send without waiting; `receive` the answer by the returned id."""
        request_id = str(next(self._ids)).encode()
        self._waiting.add(request_id)
        try:
            self._socket.send_multipart([request_id, protocol.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._waiting.discard(request_id)
            raise UnavailableError(f"the daemon of {self.home} takes no messages") from error
        return request_id

    def receive(self, request_id: bytes, timeout: float) -> Any:
        """The answer to a request, raw; `DeadlineError` after `timeout` seconds.

        After that, ask again later, or `forget` the request. `UnavailableError` if `reconnect` has
        forgotten it.
        """
        deadline = time.monotonic() + timeout
        while request_id not in self._answers:
            if request_id not in self._waiting:
                raise UnavailableError("the answer was lost when the daemon went away")
            left = max(0.0, deadline - time.monotonic())
            if not self._socket.poll(left * 1e3):
                raise DeadlineError(f"the daemon of {self.home} did not answer in {timeout:.2f} s")
            self._take_answer()
        reply = self._answers.pop(request_id)
        if reply.error:
            raise error_for(reply.error, reply.message)
        return reply.result

    def _take_answer(self) -> None:
        answered, body = self._socket.recv_multipart()
        if answered in self._waiting:  # late answers of abandoned requests are dropped
            self._waiting.discard(answered)
            self._answers[answered] = protocol.decode_reply(body)

    def forget(self, request_id: bytes) -> None:
        """Nobody wants the answer to this request any more."""
        self._waiting.discard(request_id)
        self._answers.pop(request_id, None)

    def tell(self, message: protocol.Request) -> None:
        """Send without wanting the answer."""
        while self._socket.poll(0):  # answers that nobody reads would fill the socket
            self._take_answer()
        self.forget(self.send(message))

    def greet(self, timeout: float | None = None) -> protocol.Welcome:
        """Say hello; raises if no daemon answers or it speaks another version."""
        if not protocol.socket_path(self.home).exists():
            raise UnavailableError(f"no daemon serves {self.home}; start one: kvshare serve")
        hello = protocol.Hello(protocol.VERSION, self.name, os.getpid())
        answer = self._round_trip(hello, self._timeout if timeout is None else timeout)
        self.greeted = True
        return msgspec.convert(answer, protocol.Welcome)

    def call(self, message: protocol.Request, timeout: float | None = None) -> Any:
        """Send and wait; greets first where that is needed."""
        timeout = self._timeout if timeout is None else timeout
        if not self.greeted:
            self.greet(timeout)
        try:
            return self._round_trip(message, timeout)
        except ProtocolError:
            self.greet(timeout)  # the daemon was restarted and does not know this session
            return self._round_trip(message, timeout)

    def _round_trip(self, message: protocol.Request, timeout: float) -> Any:
        request_id = self.send(message)
        try:
            return self.receive(request_id, timeout)
        finally:
            self.forget(request_id)

    def _typed(self, message: protocol.Request, kind: type[T], timeout: float | None = None) -> T:
        return msgspec.convert(self.call(message, timeout), kind)

    # --- the Store's calls ----------------------------------------------------------------------

    def plan(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        timeout: float | None = None,
    ) -> ReusePlan:
        """As `Store.plan`."""
        message = plan_request(as_tokens(tokens), namespace, policy)
        return self._typed(message, ReusePlan, timeout)

    def finish(self, lease: str, outcome: Outcome) -> None:
        """As `Store.finish`."""
        self.call(protocol.Finish(lease, outcome))

    def stage(self, tokens: Tokens, namespace: Namespace, reuse: Reuse) -> Staged:
        """As `Store.stage`; fill `slot(...)` of each, then `commit`.

        One at a time: what this client staged before and did not commit is abandoned, and the
        memory that `slot` gave for it must not be written any more.
        """
        return self.stage_bytes(tokens.tobytes(), namespace, reuse)

    def stage_bytes(self, tokens: bytes, namespace: Namespace, reuse: Reuse) -> Staged:
        """As `stage`, for int32 tokens that are bytes already."""
        return self._typed(protocol.Stage(namespace, tokens, reuse), Staged)

    def commit(self, staged: str) -> str | None:
        """As `Store.commit`."""
        return self._typed(protocol.Commit(staged), str | None)  # type: ignore[arg-type]

    def abandon(self, staged: str) -> None:
        """As `Store.abandon`."""
        self.call(protocol.Abandon(staged))

    def stats(self) -> dict[str, Any]:
        """As `Store.stats`."""
        return self._typed(protocol.Stats(), dict[str, Any])

    def flush(self, timeout: float = 60.0) -> None:
        """As `Store.flush`."""
        self.call(protocol.Flush(), timeout)

    def stop(self) -> None:
        """Ask the daemon to end; one that is gone already is fine."""
        try:
            self.call(protocol.Stop(), 5.0)
        except (UnavailableError, DeadlineError):
            return

    # --- rows -------------------------------------------------------------------------------------

    def rows_of(self, arena: str, ref: BlockRef) -> memoryview:
        """The bytes of a leased block, in place. Check again with `check` after copying."""
        mapped = self.arenas.at(arena)
        mapped.check(ref)
        return mapped.rows(ref.offset, ref.nbytes)

    def check(self, arena: str, refs: Sequence[BlockRef]) -> None:
        """`LeaseError` if any of the blocks left its place meanwhile."""
        for ref in refs:
            self.arenas.at(arena).check(ref)

    def slot(self, staged: Staged, slot: Slot) -> memoryview:
        """The writable bytes of a staged slot."""
        return self.arenas.at(staged.arena).rows(slot.offset, slot.nbytes)

    def close(self) -> None:
        """Let go of socket and arenas."""
        self._socket.close()
        self.arenas.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan_request(
    tokens: Tokens, namespace: Namespace, policy: str | None, until: float = 0.0
) -> protocol.Plan:
    """The message behind `Client.plan`, for callers that do not wait."""
    return protocol.Plan(namespace, tokens.tobytes(), policy, until)
