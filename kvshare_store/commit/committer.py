"""Makes nodes durable after their rows are in the host tier: bytes first, then metadata, while
nobody waits.

One thread does it. The blocks of a batch become durable, then its node rows are committed together.
Node rows are removed before their blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvshare_store.bounded import Latest
from kvshare_store.commit.durable import Durable
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.commit.queue import Addition, Call, CommitQueue, Removal, Work, shown
from kvshare_store.errors import (
    ClaimedBlockError,
    InternalError,
    KVShareError,
    MissError,
    NoSpaceError,
)
from kvshare_store.errors.wording import short
from kvshare_store.nodes.node import Node
from kvshare_store.observability.metrics import Metrics
from kvshare_store.observability.threads import STORING, Supervised, be_nice

log = logging.getLogger("kvshare")

_REMEMBERED = 4096
"""Nodes that could not be made durable; more work than that never waits."""


class Committer:
    """Does the work in the queue, in its order."""

    def __init__(
        self, queue: CommitQueue, nodes: NodeStore, durable: Durable, metrics: Metrics
    ) -> None:
        self._queue = queue
        self._nodes = nodes
        self._durable = durable
        self._metrics = metrics
        self._health = metrics.health
        self._failed: Latest[str, None] = Latest(_REMEMBERED)
        """By id the nodes that could not be made durable, though nobody had removed them."""
        self._thread = Supervised(STORING, self._run, metrics.health)

    def close(self) -> None:
        """Finish what is queued and stop."""
        self._queue.close()
        self._thread.join()

    def _run(self) -> None:
        be_nice(10)
        while batch := self._queue.take():
            self._attempt(batch)
        self._attempt(())  # removals that were refused

    def _attempt(self, batch: Sequence[Work]) -> None:
        """Do a batch. After an unexpected error each piece is tried alone: one that fails is given
        up, and the others are not lost with it. Doing a piece twice changes nothing."""
        try:
            self._do(batch)
        except BaseException as error:  # a panic in a library's Rust code is no Exception
            log.exception("kvshare: %d pieces of work failed", len(batch))
            if len(batch) == 1:
                self._health.failed(STORING, error)
                self._give_up(batch[0], InternalError(f"{type(error).__name__}: {error}"))
                return
            for work in batch:
                self._attempt([work])

    def _give_up(self, work: Work, error: InternalError) -> None:
        if not isinstance(work, Addition):
            return
        try:
            self._fail(work.node, error)
            self._nodes.committed([work.node])
        except BaseException:  # the rest of the batch must not suffer
            log.exception("kvshare: node %s could not be given up", short(work.node.id))

    def _fail(self, node: Node, error: KVShareError) -> None:
        """A node that cannot be made durable is removed: a full disk ends saving, not serving. If
        nobody has removed it before, and not for want of room, whoever flushes is told."""
        if not isinstance(error, MissError):
            self._metrics.error(error.kind)
        was_here = self._nodes.forget(node)
        self._failed.pop(node.id, None)
        if was_here:
            self._failed[node.id] = None
        if _is_refusal(error) or (was_here and isinstance(error, MissError)):
            self._queue.failed(error)

    def _do(self, batch: Sequence[Work]) -> None:
        """Do as much as possible in one go, additions first: if a removal came first and the
        addition of the node that replaces it failed, both would be lost. Only a node that is added
        again after its removal waits for that removal."""
        additions: list[Addition] = []
        removals: list[Removal] = []
        for work in batch:
            if isinstance(work, Removal):
                removals.append(work)
                continue
            if isinstance(work, Call) or any(work.node.id in gone.nodes for gone in removals):
                self._add(additions)
                self._remove(removals)
                additions, removals = [], []
            if isinstance(work, Addition):
                additions.append(work)
            else:
                work.do()
        self._add(additions)
        self._remove(removals)

    def _add(self, additions: Sequence[Addition]) -> None:
        if not additions:
            return
        # the last form of each: one that left memory for want of room was saved again
        additions = list({addition.node.id: addition for addition in additions}.values())
        ended = self._durable.store(additions)
        for addition, error in zip(additions, ended, strict=True):
            if error is not None:
                self._fail(addition.node, error)
            else:
                self._failed.pop(addition.node.id, None)
        self._nodes.committed(addition.node for addition in additions)
        refusal = next((error for error in ended if error and _is_refusal(error)), None)
        if None in ended:
            self._health.well(STORING)
        elif refusal is not None:
            log.warning("kvshare: %d prompts were not stored: %s", len(ended), shown(refusal))
            self._health.failed(STORING, refusal)

    def _remove(self, removals: Sequence[Removal]) -> None:
        removals = [removal for removal in removals if not self._taken_back(removal)]
        refused = self._durable.remove(removals)
        self._queue.unremoved = "" if refused is None else shown(refused)

    def _taken_back(self, removal: Removal) -> bool:
        """Nodes whose place another one was to take stay if that one could not be made durable."""
        if removal.instead not in self._failed:
            return False
        try:
            back = self._durable.take_back(removal.nodes)
        except KVShareError as error:
            log.warning("kvshare: prompts are only there again after a restart: %s", error)
            return True
        if back:
            self._nodes.removed([removal])
        return back


def _is_refusal(error: KVShareError) -> bool:
    """Whether storage has refused to store something. Nodes that were removed before they were
    durable, and a full budget, do not count."""
    return not isinstance(error, MissError | NoSpaceError | ClaimedBlockError)
