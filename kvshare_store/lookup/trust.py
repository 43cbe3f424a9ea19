"""Which stored rows a request may trust: behind whose text they were computed.

Rows of the exact prefix need no trust: the request has the text itself. For the others the tree
says who has sent the text before a row. A row in the exact prefix of nodes was computed behind
their tokens, so it is of their sources. Any other row was computed behind text that its node does
not have, so it is of the one source whose request the node was made for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.policy import Mask
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node, segments_between
from kvshare_store.nodes.state import NodeState
from kvshare_store.plan.spans import Span

OWN, CONFIRMED, OTHER = range(3)
WORDS = ("own", "confirmed", "unconfirmed")
"""What people read for these."""
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

    def __init__(
        self, state: NodeState, request: Tokens, source: bytes, share: float, namespace: str
    ) -> None:
        """`namespace`: the request's. Donors of others are a pool's: the operator's, who needs no
        more trust than for a system prompt. `source`: who sends the request; empty if nobody says.
        `share`: of the request's tokens, how many may come from behind text that only one other
        source has sent."""
        self._state = state
        self._request = request.tobytes()
        self._source = source
        self._share = share
        self._namespace = namespace

    def of(self, node: Node) -> int:
        """`OWN`, `CONFIRMED` by several sources, or `OTHER`."""
        several = len(node.sources) > 1
        if several and not node.exact:
            return OTHER  # nobody knows for whose request its rows were computed
        if self._owns(node):
            return OWN
        return CONFIRMED if several or node.namespace != self._namespace else OTHER

    def _owns(self, node: Node) -> bool:
        if node.sources:
            return self._source in node.sources
        known = node.exact or not self._source  # an edited one may be made for any of the sources
        return known and self._request.startswith(node.token_bytes)

    # --- the cap -----------------------------------------------------------------------------

    def limit(self, cover: Cover, keep: Mask) -> None:
        """Keep no more rows from behind text of one other source than the share allows; those that
        come first stay."""
        if self._share >= 1:
            return
        doubtful = self.doubtful(cover, keep)
        at = np.flatnonzero(doubtful)[int(self._share * len(keep)) :]
        keep[at] = False
        if len(at) and at[0] < cover.in_place:
            keep[at[0] : cover.in_place] = False  # what is continued has no gap
            cover.in_place = int(at[0])

    def doubtful(self, cover: Cover, keep: Mask) -> Mask:
        """Positions behind the exact prefix whose rows are not trusted."""
        doubtful = np.zeros(len(keep), np.bool_)
        taken = [one for one in _parts(cover, keep) if one[0].namespace == self._namespace]
        reach = self._reaches({node.blocks[part.block] for node, part, *_ in taken})
        for node, part, source, stop, shift in taken:
            for first, last in self._others(node, part, reach[node.blocks[part.block]]):
                first, last = max(first, source), min(last, stop)
                doubtful[first + shift : max(first, last) + shift] = True
        return doubtful

    def _others(self, node: Node, part: Span, reach: _Reach) -> Iterator[tuple[int, int]]:
        """Runs of positions of a donor's segment with rows that are not trusted."""
        trusted, exact = (
            min(max(part.start, part.start + row - part.row), part.stop)
            for row in (reach.trusted, reach.exact)
        )
        yield trusted, exact
        if self.of(node) == OTHER:
            yield max(trusted, exact), part.stop

    def _reaches(self, blocks: Collection[str]) -> dict[str, _Reach]:
        tree = self._state.tree
        with self._state.lock:
            users = {block: list(islice(tree.users(block), _USERS)) for block in blocks}
            nodes = {name: tree.get(name) for names in users.values() for name in names}
        known = {
            name: (_exact_rows(node), self._owns(node), node.sources)
            for name, node in nodes.items()
            if node is not None
        }
        found = {}
        for block, names in users.items():
            theirs = [known[name] for name in names if name in known]
            found[block] = _reach((rows.get(block, 0), own, sent) for rows, own, sent in theirs)
        return found


def _parts(cover: Cover, keep: Mask) -> Iterator[tuple[Node, Span, int, int, int]]:
    """What is kept behind the exact prefix: donor, segment of it, the positions `source … stop-1`
    of the donor that are taken, and by how many they move."""
    for start, stop, donor, source in cover.pieces(keep):
        if start >= cover.exact:
            node, last = cover.donors[donor], source + stop - start
            for part in segments_between(node, source, last):
                yield node, part, source, last, start - source


def _exact_rows(node: Node) -> dict[str, int]:
    """For each block, one past its last row that is in the exact prefix of a node."""
    blocks, found = tuple(node.blocks), dict[str, int]()
    for part in segments_between(node, 0, node.exact_rows) if node.exact_rows else ():
        rows = part.row + min(part.stop, node.exact_rows) - part.start
        found[blocks[part.block]] = max(rows, found.get(blocks[part.block], 0))
    return found


def _reach(users: Iterable[tuple[int, bool, tuple[bytes, ...]]]) -> _Reach:
    """`users`: how far each has the block in its exact prefix, whether it is one's own, and its
    sources."""
    by_source: defaultdict[bytes, int] = defaultdict(int)
    exact = own = 0
    for rows, is_own, sources in users:
        exact = max(exact, rows)
        own = max(own, rows if is_own else 0)
        for source in sources:
            by_source[source] = max(by_source[source], rows)
    second = sorted(by_source.values())[-2] if len(by_source) > 1 else 0
    return _Reach(exact, max(own, second))


def trust_of(
    state: NodeState, share: float, request: Tokens, source: bytes, namespace: str
) -> Trust | None:
    """What a request trusts, as in `Trust`; None where all is trusted alike."""
    if not source and share >= 1:
        return None
    return Trust(state, request, source, share, namespace)
