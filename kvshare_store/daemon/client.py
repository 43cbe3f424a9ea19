"""A client of the daemon. One thread, one client; calls end by their deadline, always."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvshare_store.blocks.arena import Arenas
from kvshare_store.daemon import protocol
from kvshare_store.daemon.session import Session
from kvshare_store.errors import DeadlineError, UnavailableError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, Outcome, ReusePlan
from kvshare_store.staging import Reuse, Slot, Staged
from kvshare_store.tree.edits import Tokens, as_tokens

T = TypeVar("T")


class Client(Session):
    """The Store's calls, over the socket of one home. `UnavailableError` when no daemon is there.

    A daemon that was restarted is greeted anew by itself; `DeadlineError` when it does not answer
    in time.
    """

    def __init__(self, home: str | Path, *, timeout: float = 10.0) -> None:
        super().__init__(Path(home).expanduser(), timeout)
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
        """Let go of connection and arenas."""
        super().close()
        self.arenas.close()


def plan_request(
    tokens: Tokens, namespace: Namespace, policy: str | None, until: float = 0.0
) -> protocol.Plan:
    """The message behind `Client.plan`, for callers that do not wait."""
    return protocol.Plan(namespace, tokens.tobytes(), policy, until)
