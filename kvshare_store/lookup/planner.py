"""The planner: nominate donors, align, apply the policy, weigh the cost. It changes nothing, and
holds no lock but for the moments in which donors are nominated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import align, common_prefix, passages
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.grams import GRAM
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.policy import (
    Mask,
    ReusePolicy,
    as_strict,
    continues,
    edges_of,
    kept_positions,
    runs_of,
    usable_tokens,
)
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.vectors import lexical_vector
from kvshare_store.plan import BlockRef, Context, ReusePlan, Span

_PRIMARIES = 3
"""Candidates aligned in full before one becomes the first donor."""
_ENOUGH = 0.95
"""A first donor that covers this much needs no further candidates."""
_FOR_GAPS = 0.3
"""Share of the effort that is kept for filling the gaps of the first donor."""
_GIVEN_UP = 0.1
"""Most that `approximation_price` is for rows that continue a prompt: the engine's own prefix cache
would have had them."""
_MOSTLY = 0.5
"""A prompt of which less is covered gets a second look."""
_WIDER = 4
"""So many times as many candidates are looked at by then."""


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

    def fill(self, plan: ReusePlan, blocks: Iterable[BlockRef]) -> ReusePlan:
        """`plan` with all that this draft says; `blocks`: where its blocks are."""
        return msgspec.structs.replace(
            plan,
            exact=self.exact,
            continued=self.continued,
            contexts=self.contexts,
            spans=self.spans,
            blocks=tuple(blocks),
            donors=tuple(donor.id for donor in self.donors),
            stamps=tuple(donor.stamp for donor in self.donors),
            generation=self.generation,
            saving_ms=self.saving_ms,
            declined=self.declined,
        )


class Planner:
    """Makes plans of immutable nodes. Thread-safe."""

    def __init__(self, config: StoreConfig, effort: Callable[[], Effort] = Effort) -> None:
        """`effort`: what each plan may spend on alignment."""
        self._config = config
        self._effort = effort

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
        if policy.edited and cover.in_place < len(request) - 1:
            self._cover_edited(cover, nominator, policy)
        if not cover.covered:
            return Draft(declined="no_donor")
        keep = kept_positions(
            policy, request, cover.donor_of, cover.source_of, cover.in_place, delimiters
        )
        self._drop_dear(cover, keep, policy)
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
        """Most prompts are served by the first few candidates; the others get a second look."""
        count = self._config.candidates
        nodes = nominator.by_words(lexical_vector(cover.request), _WIDER * count)
        first, more, effort = nodes[:count], nodes[count:], self._effort()
        self._cover_from(cover, _usable([*cover.donors, *first], policy), policy, effort)
        if cover.covered < _MOSTLY * len(cover.request):
            more = _usable([*more, *nominator.by_text(first, count)], policy)
            seen = {node.id for node in (*first, *cover.donors)}
            more = [node for node in more if node.id not in seen]
            self._cover_from(cover, more, policy, effort)

    def _cover_from(
        self, cover: Cover, nodes: list[Node], policy: ReusePolicy, effort: Effort
    ) -> None:
        """The node that covers most becomes the first donor; others fill what it leaves."""
        self._take_prefix(cover, nodes, policy)
        aligned: list[tuple[int, Node, list[Match]]] = []
        effort.reserve = _FOR_GAPS
        for node in cover.sharing_text(nodes, effort):
            matches = align(cover.request, usable_tokens(policy, node), effort)
            useful = _useful(matches, cover.in_place, policy.min_run)
            aligned.append((useful, node, matches))
            enough = _ENOUGH * len(cover.request) - cover.in_place
            if useful >= enough or len(aligned) == _PRIMARIES:
                break
        if not aligned:
            return
        _, first, matches = max(aligned, key=lambda entry: entry[0])
        cover.add(first, matches)
        effort.reserve = 0.0
        # text from elsewhere is worth its seam only in runs that outlast the window after it
        shortest = max(2 * GRAM, 2 * policy.edit_window, policy.min_run)
        for node in (first, *(node for node in nodes if node is not first)):
            gaps = [gap for gap in runs_of(cover.donor_of < 0) if gap.length >= shortest]
            if not gaps or len(cover.donors) >= self._config.max_donors:
                return
            found = passages(cover.request, usable_tokens(policy, node), gaps, shortest, effort)
            cover.add(node, found, shortest)

    def _drop_dear(self, cover: Cover, keep: Mask, policy: ReusePolicy) -> None:
        """Keep no approximation that saves too little for what it spoils: all that is computed
        behind it becomes as approximate, and at the last generation nobody may build on that."""
        price = self._config.approximation_price
        _drop(keep, cover.in_place, price)
        continues = cover.continues
        last = continues is not None and continues.generation >= policy.max_generation
        if last and _drop(keep, cover.exact, min(price, _GIVEN_UP)):
            cover.in_place = cover.exact

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
            continued=min(cover.in_place, spans[-1].stop) if cover.continued else 0,
            contexts=cover.contexts(),
            spans=tuple(spans),
            blocks=tuple(blocks),
            donors=donors,
            generation=generation,
            saving_ms=saving,
            tier=next((slow for slow in ("remote", "disk") if slow in tier_bytes), "host"),
        )


def _drop(keep: Mask, start: int, price: float) -> bool:
    """Keep nothing from `start` on if that saves fewer than `price` tokens for each it leaves."""
    saved = int(np.count_nonzero(keep[start:]))
    dear = saved < price * (len(keep) - start - saved)
    if dear:
        keep[start:] = False
    return dear


def _usable(nodes: list[Node], policy: ReusePolicy) -> list[Node]:
    """Nodes that have rows to build on, each once."""
    distinct = {node.id: node for node in nodes}
    return [node for node in distinct.values() if len(usable_tokens(policy, node))]


def _useful(matches: list[Match], start: int, min_run: int) -> int:
    """Positions from `start` on that runs of at least `min_run` tokens cover."""
    runs = ((max(at, start), at + length) for at, _, length in matches if length >= min_run)
    return sum(max(0, stop - first) for first, stop in runs)


def _lineage(cover: Cover, keep: Mask) -> tuple[tuple[Node, ...], int]:
    """The donors of kept positions, the one with most of them first, and the generation
    that building on them makes."""
    kept = cover.donor_of[keep]
    counts = np.bincount(kept, minlength=len(cover.donors)).tolist()
    used = [donor for donor, count in enumerate(counts) if count]
    used.sort(key=lambda donor: (-counts[donor], int((kept == donor).argmax())))
    generation = cover.continues.generation if cover.continued and cover.continues else 0
    edited = np.flatnonzero(keep[cover.in_place :]) + cover.in_place
    donors, sources = cover.donor_of[edited], cover.source_of[edited]
    for donor in set(donors.tolist()):
        node, last = cover.donors[donor], int(sources[donors == donor].max())
        generation = max(generation, 1 + (node.generation if last >= node.exact_rows else 0))
    return tuple(cover.donors[donor] for donor in used), generation
