"""The planner: nominate donors, align, apply the policy, weigh the cost. It changes nothing, and
holds no lock but for the moments in which donors are nominated."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import align, common_prefix, passages
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.grams import GRAM
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces, guess
from kvshare_store.lookup.policy import LEAST_WINDOW, Mask, ReusePolicy, edges_of, kept_positions
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import lexical_vector
from kvshare_store.plan import Span

_ENOUGH = 0.95
"""A first donor that covers this much needs no further candidates."""
_FOR_GAPS = 0.3
"""Share of the effort that is kept for filling the gaps of the first donor."""
_MOSTLY = 0.5
"""A prompt of which less is covered gets a second look."""
_WIDER = 4
"""So many times as many candidates are looked at by then."""
_HASHED = 32
"""Cells that hashing a token costs."""


class Draft(NamedTuple):
    """A plan before its blocks are leased. `spans[i].block` indexes `blocks`."""

    exact: int = 0
    spans: tuple[Span, ...] = ()
    blocks: tuple[str, ...] = ()
    donors: tuple[Node, ...] = ()
    generation: int = 0
    saving_ms: float = 0.0
    tier: str = "host"
    """The slowest tier that some of the blocks come from."""
    declined: str = ""


class Planner:
    """Makes plans of immutable nodes. Thread-safe."""

    def __init__(self, config: StoreConfig, effort: Callable[[], Effort] = Effort) -> None:
        """`effort`: what each plan may spend on alignment."""
        self._config = config
        self._effort = effort
        self._places = KnownPlaces()

    def draft(
        self,
        request: Tokens,
        nominator: Nominator,
        policy: ReusePolicy,
        cost: CostModel,
        *,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
        delimiters: Collection[int] = (),
    ) -> Draft:
        """The best plan for `request`, or one that is declined with a reason code."""
        if policy.name == "off":
            return Draft(declined="policy_off")
        if len(request) < max(2, self._config.min_prompt_tokens):
            return Draft(declined="short_prompt")
        if not nominator:
            return Draft(declined="empty_store")
        cover = Cover(request)
        self._take_best_prefix(cover, nominator.by_prefix(request))
        if policy.edited and cover.exact < len(request) - 1:
            self._cover_edited(cover, nominator, policy)
        cover.add_what_waits()
        if not cover.covered:
            return Draft(declined="no_donor")
        keep = kept_positions(
            policy, request, cover.donor_of, cover.source_of, cover.exact, delimiters
        )
        return self._weigh(cover, keep, cost, tier_of, row_bytes)

    # --- candidates --------------------------------------------------------------------------

    def _take_best_prefix(self, cover: Cover, nodes: list[Node]) -> None:
        """Tokens decide: the chain's hashes only nominated."""
        longest = len(cover.request) - 1
        for node in nodes:
            exact = min(common_prefix(cover.request, node.tokens), node.exact_rows, longest)
            if exact > cover.exact:
                cover.add_exact(node, exact)

    def _cover_edited(self, cover: Cover, nominator: Nominator, policy: ReusePolicy) -> None:
        """A prompt that goes on from a stored one needs no candidates but for what is new. Most
        others are served by the first few; the rest get a second look."""
        count, effort = self._config.candidates, self._effort()
        continued = self._usable(cover.donors, policy)
        served = self._take_donor(cover, continued, policy, effort, _ENOUGH)
        if served:
            self._fill_gaps(cover, continued, policy, effort)
            if not cover.gaps(_shortest(policy)):
                return
        nodes = nominator.by_words(lexical_vector(cover.request), _WIDER * count)
        first, more = nodes[:count], nodes[count:]
        usable = self._usable([*cover.donors, *first], policy)
        if not served:
            self._take_donor(cover, usable, policy, effort)
        self._fill_gaps(cover, usable, policy, effort)
        if cover.covered < _MOSTLY * len(cover.request):
            more = self._usable([*more, *nominator.by_text(first, count)], policy)
            seen = {node.id for node in usable}
            more = [node for node in more if node.id not in seen]
            self._take_donor(cover, more, policy, effort)
            self._fill_gaps(cover, more, policy, effort)

    def _usable(self, nodes: list[Node], policy: ReusePolicy) -> list[Node]:
        """Nodes that may be built on, each once."""
        distinct = {node.id: node for node in nodes}
        return [node for node in distinct.values() if node.generation < policy.max_generation]

    def _take_donor(
        self,
        cover: Cover,
        nodes: list[Node],
        policy: ReusePolicy,
        effort: Effort,
        share: float = 0.0,
    ) -> bool:
        """The node that seems to have most of the request, and at least this share, is aligned with
        it. Whether there is one."""
        effort.reserve = _FOR_GAPS
        self._take_best_prefix(cover, nodes)
        tokens, donor = self._likeliest(cover, nodes, effort)
        if donor is None or tokens < share * len(cover.request):
            return False
        theirs = partial(self._places.of, donor)
        request, least = cover.request, policy.min_run
        found = align(request, donor.tokens, effort, least=least, ours=cover.sought, theirs=theirs)
        sure, doubtful = _sorted_out(found, len(request), policy)
        cover.add(donor, sure)
        cover.add_later(donor, doubtful)
        return True

    def _likeliest(
        self, cover: Cover, nodes: list[Node], effort: Effort
    ) -> tuple[float, Node | None]:
        """The node that shares most text with the request, and about how many tokens. Looks no
        further than to one that seems to have nearly all."""
        best: tuple[float, Node | None] = 0.0, None
        for node in nodes:
            if not self._places.known(node) and not effort.spend(_HASHED * node.length):
                continue
            tokens = guess(cover.sought, self._places.of(node))
            if tokens > best[0]:
                best = tokens, node
            if tokens >= _ENOUGH * len(cover.request):
                break
        return best

    def _fill_gaps(
        self, cover: Cover, nodes: list[Node], policy: ReusePolicy, effort: Effort
    ) -> None:
        """Passages of the nodes fill what the first donor leaves."""
        effort.reserve = 0.0
        shortest = _shortest(policy)
        first = cover.donors[-1].id if cover.donors else ""
        for node in sorted(nodes, key=lambda node: node.id != first):
            gaps = cover.gaps(shortest)
            if not gaps or len(cover.donors) >= self._config.max_donors:
                return
            theirs = partial(self._places.of, node)
            found = passages(
                cover.request, node.tokens, gaps, shortest, effort, ours=cover.sought, theirs=theirs
            )
            cover.add(node, found, shortest)

    # --- the answer --------------------------------------------------------------------------

    def _weigh(
        self,
        cover: Cover,
        keep: Mask,
        cost: CostModel,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
    ) -> Draft:
        pieces = cover.pieces(keep)
        if not len(pieces.start):
            return Draft(declined="nothing_kept")
        reused = int(np.count_nonzero(keep))
        runs = len(edges_of(~keep[: int(pieces.stop[-1])])[0])
        least = self._config.min_saving_ms
        if cost.saving_ms(reused, runs, {}) < least:
            return Draft(declined="no_saving")
        spans, blocks = cover.spans(pieces)
        tiers = [tier_of(name) for name in blocks]
        tier_bytes: dict[str, int] = {}
        for span in spans:
            tier = tiers[span.block]
            if tier is None:
                return Draft(declined="blocks_gone")
            tier_bytes[tier] = tier_bytes.get(tier, 0) + span.length * row_bytes
        saving = cost.saving_ms(reused, runs, tier_bytes)
        if saving < least:
            return Draft(declined="no_saving")
        donors, generation = _lineage(cover, keep)
        return Draft(
            exact=min(cover.exact, spans[-1].stop),
            spans=tuple(spans),
            blocks=tuple(blocks),
            donors=donors,
            generation=generation,
            saving_ms=saving,
            tier=next((slow for slow in ("remote", "disk") if slow in tier_bytes), "host"),
        )


def _shortest(policy: ReusePolicy) -> int:
    """Text from elsewhere is worth its seam only in runs that outlast the window after it."""
    return max(2 * GRAM, 2 * policy.edit_window, policy.min_run)


def _sorted_out(
    found: list[Match], length: int, policy: ReusePolicy
) -> tuple[list[Match], list[Match]]:
    """Matches that other donors cannot better, and short ones that are all there is in a stretch of
    the request where a passage from elsewhere might be."""
    lasting = policy.min_run + (LEAST_WINDOW if policy.edit_growth else policy.edit_window)
    sure: list[Match] = []
    doubtful: list[Match] = []
    few: list[Match] = []
    at, shortest = 0, _shortest(policy)
    for match in (*found, Match(length, 0, 0)):
        if match.length < lasting and match.start < length:
            few.append(match)
            continue
        (doubtful if match.start - at >= shortest else sure).extend(few)
        sure.append(match)
        few, at = [], match.start + match.length
    return sure[:-1], doubtful


def _lineage(cover: Cover, keep: Mask) -> tuple[tuple[Node, ...], int]:
    """The donors of kept positions, the one with most of them first, and the generation
    that building on them makes."""
    kept = cover.donor_of[keep]
    counts = np.bincount(kept, minlength=len(cover.donors)).tolist()
    used = [donor for donor, count in enumerate(counts) if count]
    used.sort(key=lambda donor: (-counts[donor], int((kept == donor).argmax())))
    # the exact prefix is kept whole, but for what the last position takes away from it
    edited = kept[int(np.count_nonzero(keep[: cover.exact])) :]
    generations = [cover.donors[donor].generation for donor in set(edited.tolist())]
    return tuple(cover.donors[donor] for donor in used), 1 + max(generations, default=-1)
