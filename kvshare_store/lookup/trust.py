"""Which stored rows a request may trust: behind whose text they were computed.

Rows of the exact prefix need no trust: the request has the text itself. For the others the tree
says who has sent the text before a row. A row in the exact prefix of nodes was computed behind
their tokens, so it is of their sources; any other row is of the node that it is taken from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np

from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.policy import Mask
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, segments_between
from kvshare_store.nodes.state import NodeState
from kvshare_store.plan import Span

OWN, CONFIRMED, OTHER = range(3)
_USERS = 64
"""Most nodes of a block that are asked who has sent them."""


class _Reach(NamedTuple):
    """Of a block, one past the last row that is …"""

    exact: int
    """… in the exact prefix of any node."""
    trusted: int
    """… and whose text was sent by this source, or by several."""


class Trust:
    """What one request trusts. Nodes without sources are nobody's, but for the conversation that
    the request continues."""

    def __init__(self, state: NodeState, request: Tokens, source: bytes, share: float) -> None:
        """`source`: who sends the request; empty if nobody says. `share`: of the request's tokens,
        how many may come from behind text that only one other source has sent."""
        self._state = state
        self._request = request.tobytes()
        self._source = source
        self._share = share

    def of(self, node: Node) -> int:
        """`OWN`, `CONFIRMED` by several sources, or `OTHER`."""
        if self._owns(node):
            return OWN
        return CONFIRMED if len(node.sources) > 1 else OTHER

    def _owns(self, node: Node) -> bool:
        if node.sources:
            return self._source in node.sources
        return self._request.startswith(node.token_bytes)

    # --- the cap -----------------------------------------------------------------------------

    def limit(self, cover: Cover, keep: Mask) -> None:
        """Keep no more rows from behind text of one other source than the share allows; those that
        come first stay."""
        if self._share >= 1:
            return
        with self._state.lock:
            doubtful = self._doubtful(cover, keep)
        at = np.flatnonzero(doubtful)[int(self._share * len(keep)) :]
        keep[at] = False
        if len(at) and at[0] < cover.in_place:
            keep[at[0] : cover.in_place] = False  # what is continued has no gap
            cover.in_place = int(at[0])

    def _doubtful(self, cover: Cover, keep: Mask) -> Mask:
        doubtful = np.zeros(len(keep), np.bool_)
        pieces = cover.pieces(keep)
        donors, sources = cover.donor_of[pieces.start], cover.source_of[pieces.start]
        places = np.stack((*pieces, donors, sources), 1).tolist()
        for start, stop, donor, source in places:
            if start < cover.exact:
                continue
            node, shift = cover.donors[donor], start - source
            for part in segments_between(node, source, stop - shift):
                for first, last in self._others(node, part):
                    first, last = max(first, source), min(last, stop - shift)
                    doubtful[first + shift : max(first, last) + shift] = True
        return doubtful

    def _others(self, node: Node, part: Span) -> Iterable[tuple[int, int]]:
        """Runs of positions of a donor's segment with rows that are not trusted."""
        reach = self._reach(node.blocks[part.block])
        trusted, exact = (
            min(max(part.start, part.start + row - part.row), part.stop)
            for row in (reach.trusted, reach.exact)
        )
        yield trusted, exact
        if self.of(node) == OTHER:
            yield max(trusted, exact), part.stop

    def _reach(self, block: str) -> _Reach:
        by_source: defaultdict[bytes, int] = defaultdict(int)
        exact = own = 0
        for name in islice(self._state.tree.users(block), _USERS):
            node = self._state.tree.get(name)
            rows = _exact_rows(node, block) if node is not None else 0
            if node is None or not rows:
                continue
            exact = max(exact, rows)
            own = max(own, rows if self._owns(node) else 0)
            for source in node.sources:
                by_source[source] = max(by_source[source], rows)
        second = sorted(by_source.values())[-2] if len(by_source) > 1 else 0
        return _Reach(exact, max(own, second))


def _exact_rows(node: Node, block: str) -> int:
    """One past the last row of a block that is in the exact prefix of a node; 0 if none is."""
    blocks = tuple(node.blocks)
    segments = segments_between(node, 0, node.exact_rows) if node.exact_rows else ()
    rows = (
        part.row + min(part.stop, node.exact_rows) - part.start
        for part in segments
        if blocks[part.block] == block
    )
    return max(rows, default=0)


class Trusting(Nominator):
    """Names the donors that a request trusts most first; of those that seem to have about as much
    the first is taken."""

    def __init__(self, state: NodeState, namespace: str, trust: Trust) -> None:
        super().__init__(state.tree, state.index(namespace), state.lock)
        self._trust = trust

    def _nodes(self, ids: Iterable[str]) -> list[Node]:
        return sorted(super()._nodes(ids), key=self._trust.of)
