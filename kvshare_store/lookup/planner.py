"""The planner: nominate donors, align, apply the policy, weigh the cost. It changes nothing, and
holds no lock but for the moments in which donors are nominated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover, Piece, placeholder_runs
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces
from kvshare_store.lookup.policy import Mask, ReusePolicy, as_strict, kept_positions
from kvshare_store.lookup.search import Search
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import Node
from kvshare_store.plan import BlockRef, ReusePlan

_LAST = 4.0
"""Times `approximation_price` that rows cost which are moved for the last time: whatever is
computed behind them must be computed again with the next edit."""
_GIVEN_UP = 0.1
"""Most that `approximation_price` is for rows that continue a prompt: the engine's own prefix cache
would have had them."""


class Planned(NamedTuple):
    """A plan before its blocks are leased, and what only the store needs to know of it."""

    plan: ReusePlan
    donors: tuple[Node, ...] = ()
    """The plan's, as they were when it was made."""
    tier: str = "host"
    """The slowest tier that some of the blocks come from."""

    def used(self, policy: ReusePolicy, *, answers: bool) -> list[Node]:
        """Donors that count as used, where the request will be stored too. Where nothing may be
        edited, one that the request parts from before its end does not: the request's own node
        keeps the blocks of their beginning, and only who repeats the rest can use that. A prefix
        cache orders its blocks so. With edits the rest may serve the next turn.

        `answers`: a prompt that is known already has a node of its own once it is answered.
        """
        plan = self.plan
        if policy.edited:
            return list(self.donors)
        most = plan.tokens if answers else plan.tokens - 1  # the last token is always computed
        return [one for one in self.donors if plan.exact >= min(one.length - 1, most)]

    def declined(self, reason: str) -> Planned:
        """The same plan, declined for this reason; itself if that is empty."""
        return _declined(self.plan, reason) if reason else self


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

    def know(self, node: Node) -> None:
        """Make now what the first plan that looks at the node would wait for."""
        self._places.of(node)

    def plan(
        self,
        request: Tokens,
        nominator: Nominator,
        policy: ReusePolicy,
        cost: CostModel,
        *,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
        namespace: str = "",
        delimiters: Collection[int] = (),
        watch: Callable[[Cover, Mask], None] | None = None,
        limit: Callable[[Cover, Mask], None] | None = None,
    ) -> Planned:
        """The best plan for `request`, or one that is declined with a reason code. `watch` is
        shown what covers the request, and which positions of it are kept; `limit` may keep fewer
        of those behind the exact prefix."""
        bare = ReusePlan(namespace=namespace, tokens=len(request), policy=policy.name)
        if policy.name == "off":
            return _declined(bare, "policy_off")
        if len(request) < max(2, self._config.min_prompt_tokens):
            return _declined(bare, "short_prompt")
        if not nominator:
            return _declined(bare, "empty_store")
        cover = Cover(request)
        effort = self._effort()
        search = self._search(cover, nominator, policy, self._config, self._places, effort)
        allowed = as_strict(policy.name) if policy.edited else ()
        search.take_prefix(nominator.by_prefix(request, allowed))
        if policy.edited and cover.in_place < len(request) - 1:
            search.edited()
        if not cover.covered:
            return _declined(bare, "no_donor")
        keep = kept_positions(
            policy, request, cover.donor_of, cover.source_of, cover.in_place, delimiters
        )
        if limit is not None:
            limit(cover, keep)
        self._drop_dear(cover, keep, policy)
        if watch is not None:
            watch(cover, keep)
        return self._weigh(bare, cover, keep, cost, tier_of, row_bytes)

    def _drop_dear(self, cover: Cover, keep: Mask, policy: ReusePolicy) -> None:
        """Keep no approximation that saves too little for what it spoils: all that is computed
        behind it becomes as approximate, and at the last generation nobody may build on that."""
        price = self._config.approximation_price
        moved = _moved_last(cover, keep, policy)
        left = np.count_nonzero(~keep[cover.in_place :])
        if np.count_nonzero(moved) < _LAST * price * left:
            keep &= ~moved
        _drop(keep, cover.in_place, price)
        continues = cover.continues
        last = continues is not None and continues.generation >= policy.max_generation
        if last and _drop(keep, cover.exact, min(price, _GIVEN_UP)):
            cover.in_place = cover.exact

    def _weigh(
        self,
        bare: ReusePlan,
        cover: Cover,
        keep: Mask,
        cost: CostModel,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
    ) -> Planned:
        pieces = cover.pieces(keep)
        if not pieces:
            return _declined(bare, "nothing_kept")
        reused = int(np.count_nonzero(keep))
        runs = placeholder_runs(pieces)
        least = self._config.min_saving_ms
        if cost.saving_ms(reused, runs, {}) < least:
            return _declined(bare, "no_saving")
        spans, blocks = cover.spans(pieces)
        tiers = [tier_of(name) for name in blocks]
        tier_bytes: dict[str, int] = {}
        for tier in set(tiers):
            if tier is None:
                return _declined(bare, "blocks_gone")
            rows = sum([span.length for span in spans if tiers[span.block] == tier])
            tier_bytes[tier] = rows * row_bytes
        saving = cost.saving_ms(reused, runs, tier_bytes)
        if saving < least:
            return _declined(bare, "no_saving")
        donors, generation = _sources(cover, pieces)
        plan = msgspec.structs.replace(
            bare,
            exact=min(cover.exact, spans[-1].stop),
            continued=min(cover.in_place, spans[-1].stop) if cover.continued else 0,
            contexts=cover.contexts(),
            spans=tuple(spans),
            blocks=tuple(map(BlockRef, blocks)),
            donors=tuple(donor.id for donor in donors),
            stamps=tuple(donor.stamp for donor in donors),
            generation=generation,
            saving_ms=saving,
            assumed_speed=cost.prefill.assumed,
        )
        return Planned(plan, donors, slowest_of(tier_bytes))


def slowest_of(tiers: Collection[str | None]) -> str:
    """The slowest of the tiers that a plan's blocks are in."""
    return next((slow for slow in ("remote", "disk") if slow in tiers), "host")


def _declined(bare: ReusePlan, reason: str) -> Planned:
    return Planned(msgspec.structs.replace(bare, declined=reason))


def _drop(keep: Mask, start: int, price: float) -> bool:
    """Keep nothing from `start` on if that saves fewer than `price` tokens for each it leaves."""
    saved = int(np.count_nonzero(keep[start:]))
    dear = saved < price * (len(keep) - start - saved)
    if dear:
        keep[start:] = False
    return dear


def _moved_last(cover: Cover, keep: Mask, policy: ReusePolicy) -> Mask:
    """Positions that approximate rows are moved to, so that nobody may build on them any more. None
    if nobody may in any case."""
    last, continues = policy.max_generation, cover.continues
    moved = np.zeros(len(keep), np.bool_)
    if last > 1 and (continues is None or continues.generation < last):
        for at, donor in enumerate(cover.donors):
            if donor.generation + 1 >= last:
                moved |= (cover.donor_of == at) & (cover.source_of >= donor.exact_rows)
        moved[: cover.in_place] = False
    return moved & keep


def _sources(cover: Cover, pieces: Sequence[Piece]) -> tuple[tuple[Node, ...], int]:
    """The donors of some pieces, the one with most positions first, and the generation that
    building on them makes."""
    counts: dict[int, int] = {}  # of equals the first one first
    generation = cover.continues.generation if cover.continued and cover.continues else 0
    for start, stop, donor, source in pieces:
        length = stop - start
        counts[donor] = counts.get(donor, 0) + length
        if start >= cover.in_place:
            node = cover.donors[donor]
            built_on = node.generation if source + length > node.exact_rows else 0
            generation = max(generation, 1 + built_on)
    by_weight = sorted(counts, key=lambda donor: -counts[donor])
    return tuple(cover.donors[donor] for donor in by_weight), generation
