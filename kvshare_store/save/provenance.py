"""What a client says of the rows it loaded and builds on, checked against what the store knows.

A client that saves names donors, blocks, and for each span where its rows lie and whether they are
exact. All of that the donors themselves say too, so nothing of it has to be believed. What cannot
be checked are the rows a client computed: it runs the model, and shares only with its own
namespace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from kvshare_store.config import policy_names
from kvshare_store.errors import NamespaceError, PlanError
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.namespaces import Namespaces
from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Span
from kvshare_store.save.staging import Reuse


class _Origin(NamedTuple):
    """A segment of a donor: what rows of one block are."""

    node: Node
    segment: Span
    common: int
    """Leading positions at which the donor has the request's tokens."""

    def generation_of(self, span: Span, request: Tokens) -> int | None:
        """Provenance of a span's rows; None if they are not in this segment, are the rows of other
        tokens, or are not as exact as the span says."""
        first = self.segment.start + span.row - self.segment.row
        last = first + span.length
        if first < self.segment.start or last > self.segment.stop:
            return None
        if span.exact or span.continued:
            in_place = first == span.start and span.stop <= self.common
            if not in_place or (span.exact and span.stop > self.node.exact_rows):
                return None
            return 0 if span.exact else self.node.generation
        if not np.array_equal(request[span.start : span.stop], self.node.tokens[first:last]):
            return None
        return 0 if last <= self.node.exact_rows else self.node.generation


class Verified(NamedTuple):
    """What the store knows of the rows that a save builds on."""

    sizes: dict[str, int]
    """Bytes of each block that the spans use, as the donors give them."""
    policy: str = ""
    """The laxest that any of the rows was reused under; empty if all are exact."""
    pooled: frozenset[str] = frozenset()
    """Blocks of the donors that are of pools."""


def pools_of(namespace: Namespace, donors: Sequence[Node], known: Namespaces) -> set[str]:
    """The namespaces (digests) of donors that are pools which a save in `namespace` may build on:
    those for the same model and adapter. Nothing in a pool builds on another one."""
    others = {node.namespace for node in donors} - {namespace.digest}
    found = (known.get(digest) for digest in others if not namespace.pool)
    return {
        one.digest
        for one in found
        if one is not None
        and isinstance(one.pool, str)
        and namespace.in_pool(one.pool).digest == one.digest
    }


def check_provenance(
    reuse: Reuse,
    request: Tokens,
    donors: Sequence[Node],
    namespace: Namespace,
    pools: Collection[str] = (),
) -> Verified:
    """What the donors say of the spans.

    `donors`: the nodes that `reuse.donors` names, as they are now or were when they were planned.
    `pools`: the namespaces that they may be of beside their own. `PlanError` if a span is not what
    it says or the generation is too low; `NamespaceError` if a donor belongs to somebody else.
    """
    others = [node for node in donors if node.namespace != namespace.digest]
    if any(node.namespace not in pools for node in others):
        raise NamespaceError("a save builds on a prompt of another namespace")
    origins = _origins(request, donors)
    lowest = 0
    lineage: list[Node] = []
    for span in reuse.spans:
        place = reuse.blocks[span.block], span.source - span.row
        found = [
            (generation, origin.node)
            for origin in origins.get(place, ())
            if (generation := origin.generation_of(span, request)) is not None
        ]
        if not found:
            raise PlanError(f"{span} is not what the prompts it is said to come from hold")
        generation, node = min(found, key=itemgetter(0))
        lowest = max(lowest, generation + span.edited)
        if generation:
            lineage.append(node)
    if reuse.generation < lowest or (reuse.generation > 0) != (lowest > 0):
        raise PlanError(f"rows of generation {lowest} are declared as {reuse.generation}")
    sizes = {
        name: nbytes
        for node in donors
        for name, nbytes in zip(node.blocks, node.block_bytes, strict=False)
    }  # a node of an older release does not know the bytes of its blocks
    pooled = frozenset(name for node in others for name in node.blocks)
    return Verified(sizes, _laxest(reuse, lineage) if lowest else "", pooled)


def _laxest(reuse: Reuse, lineage: Sequence[Node]) -> str:
    """The laxest policy of the rows; empty, which nobody builds on, if one of them is unknown."""
    edited = any(span.edited for span in reuse.spans)
    policies = {node.policy for node in lineage} | ({reuse.policy} if edited else set())
    names = policy_names()
    known = policies <= {*names}
    return max(policies, key=names.index) if known else ""


def _origins(request: Tokens, donors: Sequence[Node]) -> dict[tuple[str, int], list[_Origin]]:
    """Segments of the donors by block, and by the position that row 0 of it would be from."""
    found: defaultdict[tuple[str, int], list[_Origin]] = defaultdict(list)
    for node in donors:
        common = common_prefix(request, node.tokens)
        for segment in node.segments:
            place = node.blocks[segment.block], segment.source - segment.row
            found[place].append(_Origin(node, segment, common))
    return found
