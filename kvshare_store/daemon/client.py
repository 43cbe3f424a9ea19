"""A client of the daemon, for one thread. Every call ends by its deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvshare_store.blocks.tiers.host.arena import Arenas, ArenaView
from kvshare_store.daemon import protocol
from kvshare_store.daemon.fetching import LeasedRows, WireOutbox, fetch
from kvshare_store.daemon.network import Place, Remote
from kvshare_store.daemon.outbox import Outbox
from kvshare_store.daemon.protocol import Role
from kvshare_store.daemon.session import Session
from kvshare_store.errors import DeadlineError, KVShareError, UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens, as_tokens
from kvshare_store.plan import LABEL_CHARS, BlockRef, Outcome, ReusePlan
from kvshare_store.save.staging import Reuse, Staged

T = TypeVar("T")


class Client(Session):
    """The Store's calls, over the socket of one home, or over the network. `UnavailableError` when
    no daemon is there.

    A daemon that was restarted is greeted anew by itself; `DeadlineError` when it does not answer
    in time.
    """

    def __init__(self, home: str | Place, *, timeout: float = 10.0, role: Role = "admin") -> None:
        """`home`: the folder that the daemon serves, or `place_of` a configuration."""
        place = home if isinstance(home, Remote) else Path(home).expanduser()
        super().__init__(place, timeout, role)
        self.arenas = Arenas()

    def _typed(self, message: protocol.Request, kind: type[T], timeout: float | None = None) -> T:
        return msgspec.convert(self.call(message, timeout), kind)

    def plan(
        self,
        tokens: Sequence[int] | Tokens,
        namespace: Namespace,
        *,
        policy: str | None = None,
        timeout: float | None = None,
        pools: Sequence[str] = (),
    ) -> ReusePlan:
        """As `Store.plan`."""
        message = plan_request(as_tokens(tokens), namespace, policy, pools=pools)
        return self._typed(message, ReusePlan, timeout)

    def finish(self, lease: str, outcome: Outcome) -> None:
        """As `Store.finish`."""
        self.call(protocol.Finish(lease, outcome))

    def stage(self, tokens: Tokens, namespace: Namespace, reuse: Reuse) -> Staged:
        """As `Store.stage`. One at a time: what this client staged before ends."""
        return self.stage_bytes(tokens.tobytes(), namespace, reuse)

    def stage_bytes(
        self,
        tokens: bytes,
        namespace: Namespace,
        reuse: Reuse,
        extends: int = 0,
        *,
        greedy: bool = False,
        request: str = "",
        source: bytes = b"",
    ) -> Staged:
        """As `stage`, for int32 tokens that are bytes already; the rest as in `Store.stage`."""
        name = request[:LABEL_CHARS]
        message = protocol.Stage(namespace, tokens, reuse, extends, greedy, name, source)
        return self._typed(message, Staged)

    def commit(self, staged: Staged, blocks: Iterable[Any]) -> str | None:
        """As `Store.commit`. `blocks`: bytes-like, the rows of each block of `staged.sizes`; one is
        written before the next is asked for, so they may share a buffer.

        Whatever fails, the save has ended. After `DeadlineError` it may still be stored; the
        connection, and what it held, is then given up.
        """
        self.open()
        try:
            self._write(staged, blocks)
            return self._typed(protocol.Commit(staged.id), str | None)  # type: ignore[arg-type]
        except BaseException as error:
            if isinstance(error, DeadlineError) or not isinstance(error, KVShareError):
                self.reconnect()  # the daemon may still read this outbox: it is written no more
            raise
        finally:
            if self.outbox is not None:
                self.outbox.clear()

    def _write(self, staged: Staged, blocks: Iterable[Any]) -> None:
        outbox: Outbox | WireOutbox | None = self.outbox
        offset = 0
        if self.remote:
            outbox = WireOutbox(self, staged.id)
        if outbox is None:
            raise UnavailableError(f"the daemon of {self.home} is gone")
        try:
            for block in blocks:
                offset += outbox.write(offset, block)
            outbox.settle()
        except Exception:
            if self.connected:
                self.abandon(staged.id)
            raise

    def abandon(self, staged: str) -> None:
        """As `Store.abandon`."""
        self.call(protocol.Abandon(staged))

    def stats(self) -> dict[str, Any]:
        """As `Store.stats`, and what there is to say about the daemon."""
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

    def mapped(self, arena: str) -> ArenaView:
        """The daemon's shared memory by its id; `LeaseError` if that is another daemon's."""
        if arena not in self.arenas and self.welcome is not None and self.welcome.arena == arena:
            self.arenas.add(arena, os.dup(self.arena))
        return self.arenas.at(arena)

    def leased_rows(
        self, lease: str, arena: str, refs: Sequence[BlockRef], seconds: float = 60.0
    ) -> LeasedRows:
        """The rows of leased blocks: in the daemon's memory, or fetched over the network.

        `LeaseError` if they are not there any more, `DeadlineError` if they do not come within
        `seconds`.
        """
        if not self.remote:
            return self.mapped(arena)
        deadline = time.monotonic() + seconds
        if not self.connected:
            self.greet(seconds)
        return fetch(self, lease, refs, deadline - time.monotonic())

    def rows_of(self, arena: str, ref: BlockRef) -> memoryview:
        """The bytes of a leased block, in place. Check again with `check` after copying."""
        mapped = self.mapped(arena)
        mapped.check(ref)
        return mapped.rows(ref.offset, ref.nbytes)

    def check(self, arena: str, refs: Sequence[BlockRef]) -> None:
        """`LeaseError` if any of the blocks left its place meanwhile."""
        for ref in refs:
            self.mapped(arena).check(ref)


def plan_request(
    tokens: Tokens,
    namespace: Namespace,
    policy: str | None,
    request: str = "",
    *,
    look: bool = False,
    pools: Sequence[str] = (),
    source: bytes = b"",
) -> protocol.Plan:
    """The message behind `Client.plan`, for callers that do not wait. `request`: its name; `look`:
    for a second look; `source`: who sends it, hashed."""
    name, raw = request[:LABEL_CHARS], tokens.tobytes()
    return protocol.Plan(
        namespace, raw, policy, request=name, look=look, source=source, pools=tuple(pools)
    )
