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
from kvshare_store.lookup.cover import Cover, Pieces
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces, guess
from kvshare_store.lookup.policy import (
    LEAST_WINDOW,
    Mask,
    ReusePolicy,
    as_strict,
    continues,
    edges_of,
    kept_positions,
    usable_tokens,
)
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.grams import GRAM
from kvshare_store.nodes.index import LONG
from kvshare_store.nodes.node import Node
from kvshare_store.plan import Context, Span

_ENOUGH = 0.95
"""A first donor that covers this much needs no further candidates."""
_FOR_GAPS = 0.3
"""Share of the effort that is kept for filling the gaps of the first donor."""
_MOSTLY = 0.5
"""A prompt of which less is covered gets a second look."""
_WIDER = 4
"""So many times as many candidates are looked at by then."""
_BETTER = 1.02
"""A guess is no surer than this: of nodes that seem to have as much the most similar is taken."""
_HASHED = 32
"""Cells that hashing a token costs."""


class Draft(NamedTuple):
    """A plan before its blocks are leased. `spans[i].block` indexes `blocks`."""

    exact: int = 0
    continued: int = 0
    contexts: tuple[Context, ...] = ()
    """Of the rows that are continued."""
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
        allowed = as_strict(policy.name) if policy.edited else ()
        self._take_prefix(cover, nominator.by_prefix(request, allowed), policy)
        least = max(1, self._config.approximation_price * len(request))
        if policy.edited and len(request) - 1 - cover.in_place >= least:
            self._cover_edited(cover, nominator, policy)
        cover.add_what_waits()
        if not cover.covered:
            return Draft(declined="no_donor")
        keep = kept_positions(
            policy, request, cover.donor_of, cover.source_of, cover.in_place, delimiters
        )
        if np.count_nonzero(keep[cover.in_place :]) < least:
            keep[cover.in_place :] = False
        return self._weigh(cover, keep, cost, tier_of, row_bytes)

    # --- candidates --------------------------------------------------------------------------

    def _take_prefix(self, cover: Cover, nodes: list[Node], policy: ReusePolicy) -> None:
        """The longest exact prefix, and how much further an edited prompt goes on with the same
        tokens. Tokens decide: the chain's hashes only nominated."""
        longest = len(cover.request) - 1
        for node in nodes:
            common = min(common_prefix(cover.request, node.tokens), longest)
            exact = min(common, node.exact_rows)
            if exact > cover.exact:
                cover.add_exact(node, exact)
            if common > max(exact, cover.in_place) and continues(policy, node):
                cover.add_continued(node, common)

    def _cover_edited(self, cover: Cover, nominator: Nominator, policy: ReusePolicy) -> None:
        """A prompt that goes on from a stored one needs no candidates but for what is new. Most
        others are served by the first few; the rest get a second look."""
        count, effort = self._config.candidates, self._effort()
        continued = _usable(cover.donors, policy)
        served = self._take_donor(cover, continued, policy, effort, _ENOUGH)
        if served:
            self._fill_gaps(cover, continued, policy, effort)
            if not cover.gaps(_shortest(policy)):
                return
        first = self._candidates(cover, nominator, served)
        usable = _usable([*cover.donors, *first], policy)
        if not served:
            self._take_donor(cover, usable, policy, effort)
        self._fill_gaps(cover, usable, policy, effort)
        if cover.covered < _MOSTLY * len(cover.request):
            more = nominator.by_words(cover.words, _WIDER * count)
            more = _usable([*more, *nominator.by_text(first, count)], policy)
            seen = {node.id for node in usable}
            more = [node for node in more if node.id not in seen]
            self._take_donor(cover, more, policy, effort)
            self._fill_gaps(cover, more, policy, effort)

    def _candidates(self, cover: Cover, nominator: Nominator, served: bool) -> list[Node]:
        """For long prompts those with the passages that nobody covers yet, where there are any; for
        others by words. The words of a long prompt that is served do not tell what is new in it."""
        count = self._config.candidates
        if len(cover.request) >= LONG:
            hashes = cover.sought.hashes(cover.sought.inside(cover.gaps(GRAM), 1))
            found = nominator.by_passages(hashes, count)
            if found or served:
                return found
        return nominator.by_words(cover.words, count)

    def _take_donor(
        self,
        cover: Cover,
        nodes: list[Node],
        policy: ReusePolicy,
        effort: Effort,
        share: float = 0.0,
    ) -> bool:
        """The node that seems to have most of what is sought is aligned with the request, if at
        least this share of the request is covered then. Whether it is."""
        effort.reserve = _FOR_GAPS
        self._take_prefix(cover, nodes, policy)
        tokens, donor = self._likeliest(cover, nodes, policy, effort)
        if cover.sought.start + tokens < share * len(cover.request):
            return False
        if donor is None:
            return share > 0
        found = align(
            cover.request,
            usable_tokens(policy, donor),
            effort,
            least=policy.min_run,
            ours=cover.sought,
            theirs=partial(self._places.of, donor),
        )
        sure, doubtful = _sorted_out(found, len(cover.request), policy)
        cover.add(donor, sure)
        cover.add_later(donor, doubtful)
        return True

    def _likeliest(
        self, cover: Cover, nodes: list[Node], policy: ReusePolicy, effort: Effort
    ) -> tuple[int, Node | None]:
        """The node that shares most text with what is sought, and about how many tokens. Looks no
        further than to one that seems to have nearly all."""
        enough = _ENOUGH * (len(cover.request) - cover.sought.start)
        best: tuple[int, Node | None] = 0, None
        for node in nodes:
            if not self._places.known(node) and not effort.spend(_HASHED * node.length):
                continue
            usable = len(usable_tokens(policy, node))
            tokens = guess(cover.sought, self._places.of(node), usable)
            if tokens > _BETTER * best[0]:
                best = tokens, node
            if tokens >= enough:
                break
        return best

    def _fill_gaps(
        self, cover: Cover, nodes: list[Node], policy: ReusePolicy, effort: Effort
    ) -> None:
        """Passages of the nodes fill what the first donor leaves."""
        effort.reserve = 0.0
        shortest = _shortest(policy)
        gaps = cover.gaps(shortest)
        first = cover.donors[-1].id if cover.donors else ""
        for node in sorted(nodes, key=lambda node: node.id != first):
            if not gaps or len(cover.donors) >= self._config.max_donors:
                return
            found = passages(
                cover.request,
                usable_tokens(policy, node),
                gaps,
                shortest,
                effort,
                ours=cover.sought,
                theirs=partial(self._places.of, node),
            )
            if found:
                cover.add(node, found, shortest)
                gaps = cover.gaps(shortest)

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
        donors, generation = _lineage(cover, pieces)
        return Draft(
            exact=min(cover.exact, spans[-1].stop),
            continued=min(cover.in_place, spans[-1].stop) if cover.continued else 0,
            contexts=cover.contexts(),
            spans=tuple(spans),
            blocks=tuple(blocks),
            donors=donors,
            generation=generation,
            saving_ms=saving,
            tier=next((slow for slow in ("remote", "disk") if slow in tier_bytes), "host"),
        )


def _usable(nodes: list[Node], policy: ReusePolicy) -> list[Node]:
    """Nodes that have rows to build on, each once."""
    distinct = {node.id: node for node in nodes}
    return [node for node in distinct.values() if len(usable_tokens(policy, node))]


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


def _lineage(cover: Cover, pieces: Pieces) -> tuple[tuple[Node, ...], int]:
    """The donors of some pieces, the one with most positions first, and the generation that
    building on them makes."""
    lengths = pieces.stop - pieces.start
    donor_of, source_of = cover.donor_of[pieces.start], cover.source_of[pieces.start]
    counts = np.bincount(donor_of, lengths, len(cover.donors)).tolist()
    used, first = np.unique(donor_of, return_index=True)
    by_weight = sorted(zip(used.tolist(), first.tolist(), strict=True),
                       key=lambda one: (-counts[one[0]], one[1]))  # fmt: skip
    generation = cover.continues.generation if cover.continued and cover.continues else 0
    edited = pieces.start >= cover.in_place
    for donor in set(donor_of[edited].tolist()):
        node, its = cover.donors[donor], edited & (donor_of == donor)
        last = int((source_of + lengths)[its].max()) - 1
        generation = max(generation, 1 + (node.generation if last >= node.exact_rows else 0))
    return tuple(cover.donors[donor] for donor, _ in by_weight), generation
