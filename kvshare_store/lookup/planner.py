"""The planner: nominate donors, align, apply the policy, weigh the cost. It changes nothing, and
holds no lock but for the moments in which donors are nominated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover, Pieces
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces
from kvshare_store.lookup.policy import Mask, ReusePolicy, as_strict, edges_of, kept_positions
from kvshare_store.lookup.search import Search
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan import BlockRef, Context, ReusePlan, Span

_GIVEN_UP = 0.1
"""Most that `approximation_price` is for rows that continue a prompt: the engine's own prefix cache
would have had them."""


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

    _search = Search

    def __init__(self, config: StoreConfig, effort: Callable[[], Effort] = Effort) -> None:
        """`effort`: what each plan may spend on alignment."""
        self._config = config
        self._effort = effort
        self._places = KnownPlaces()

    def reload(self, config: StoreConfig) -> None:
        """Make the next plans by other settings."""
        self._config = config

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
        watch: Callable[[Cover, Mask], None] | None = None,
    ) -> Draft:
        """The best plan for `request`, or one that is declined with a reason code. `watch` is
        shown what covers the request, and which positions of it are kept."""
        if policy.name == "off":
            return Draft(declined="policy_off")
        if len(request) < max(2, self._config.min_prompt_tokens):
            return Draft(declined="short_prompt")
        if not nominator:
            return Draft(declined="empty_store")
        cover = Cover(request)
        search = self._search(cover, policy, self._config, self._places, self._effort())
        allowed = as_strict(policy.name) if policy.edited else ()
        search.take_prefix(nominator.by_prefix(request, allowed))
        if policy.edited and cover.in_place < len(request) - 1:
            search.edited(nominator)
        if not cover.covered:
            return Draft(declined="no_donor")
        keep = kept_positions(
            policy, request, cover.donor_of, cover.source_of, cover.in_place, delimiters
        )
        self._drop_dear(cover, keep, policy)
        if watch is not None:
            watch(cover, keep)
        return self._weigh(cover, keep, cost, tier_of, row_bytes)

    def _drop_dear(self, cover: Cover, keep: Mask, policy: ReusePolicy) -> None:
        """Keep no approximation that saves too little for what it spoils: all that is computed
        behind it becomes as approximate, and at the last generation nobody may build on that."""
        price = self._config.approximation_price
        _drop(keep, cover.in_place, price)
        continues = cover.continues
        last = continues is not None and continues.generation >= policy.max_generation
        if last and _drop(keep, cover.exact, min(price, _GIVEN_UP)):
            cover.in_place = cover.exact

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


def _drop(keep: Mask, start: int, price: float) -> bool:
    """Keep nothing from `start` on if that saves fewer than `price` tokens for each it leaves."""
    saved = int(np.count_nonzero(keep[start:]))
    dear = saved < price * (len(keep) - start - saved)
    if dear:
        keep[start:] = False
    return dear


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
