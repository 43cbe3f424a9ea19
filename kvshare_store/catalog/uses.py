"""When nodes were last used, by any machine and before any restart. A table beside the nodes."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from kvshare_store.bounded import pieces
from kvshare_store.catalog.ledger import Fact, Ledger, within
from kvshare_store.nodes.delta_tree import DeltaTree

_LONGEST_S = 600.0
_KEPT_S = 30 * 86_400.0
"""Uses older than this (and than twice `ttl_seconds`) are forgotten here."""
_CHUNK = 512


class Uses:
    """Writes this machine's uses back in batches and reads those of others. `period`: how long, in
    seconds, a use may be known to this machine alone."""

    def __init__(
        self, ledger: Ledger, tree: DeltaTree, lock: threading.RLock, ttl_seconds: float
    ) -> None:
        self.period = min(_LONGEST_S, ttl_seconds / 4 or _LONGEST_S)
        self._kept = max(_KEPT_S, 2 * ttl_seconds)
        self._ledger = ledger
        self._tree = tree
        self._lock = lock
        self.clock = time.time
        """Seconds since 1970."""
        self._alone = threading.Lock()
        self._written = tree.clock()  # the clock above may be set meanwhile
        self._learned = 0.0

    def recorded(self, ids: Collection[str] | None = None) -> dict[str, float]:
        """When each node, or each of `ids`, was last used (seconds since 1970), as far as it was
        written down."""
        parts = [""] if ids is None else [within("key", some) for some in pieces(list(ids), _CHUNK)]
        return {fact.key: fact.at for part in parts for fact in self._ledger.facts(part)}

    def exchange(self) -> None:
        """Write down what was used here since the last time, and learn what others wrote."""
        with self._alone:
            now = self.clock()
            with self._lock:
                written = self._tree.clock()
                used = self._tree.used_within(written - self._written)
            facts = [Fact(node.id, now - idle, node.namespace) for node, idle in used]
            for some in pieces(facts, _CHUNK):
                self._ledger.put(some)
            with self._lock:
                self._tree.written_down(fact.key for fact in facts)
            self._written = written
            self._learn(now)

    def _learn(self, now: float) -> None:
        # another machine's clock may be behind, and it may have been slow to write
        since = self._learned - 2 * self.period
        heard = self._ledger.facts(f"at > {since}")
        with self._lock:
            for fact in heard:
                self._tree.used_before(fact.key, max(0.0, now - fact.at))
        self._learned = now

    def due(self) -> bool:
        """Whether it is time to write back again."""
        return self._tree.clock() - self._written >= self.period / 2

    def prune(self) -> None:
        """Forget uses of long ago."""
        if self._ledger.facts(f"at < {self.clock() - self._kept}"):
            self._ledger.remove(f"at < {self.clock() - self._kept}")
