"""Why a plan is what it is: who was nominated, who was taken, and which rule recomputes what.

The planner is watched while it plans, so that what is told is what happens. What it does not need
to know, such as what a candidate that it passed over would have given, is found out afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import align
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.cover import Cover, placeholder_runs
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.lookup.nominate import Nominator, Rank
from kvshare_store.lookup.planner import Planner
from kvshare_store.lookup.policy import (
    Mask,
    ReusePolicy,
    continues,
    kept_positions,
    usable_length,
)
from kvshare_store.lookup.steering import Steering
from kvshare_store.lookup.trust import WORDS, Trust
from kvshare_store.nodes.edits import Match, Tokens
from kvshare_store.nodes.grams import Hashes
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vector, lexical_vector
from kvshare_store.plan import ReusePlan

KINDS = ("exact", "continued", "edited")
EDIT, WINDOW, TAIL, MIN_RUN, DELIMITERS = "edit", "window", "tail", "min_run", "delimiters"
GENERATION, COST, POLICY, SOURCE = "generation", "cost", "policy", "source"
_SHOWN = 16
"""Tokens on both sides of the first difference."""


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A stored prompt that was nominated. Lengths in tokens."""

    node: str
    found_by: tuple[str, ...]
    """`prefix`, `words`, `text`, `passages`, or `asked` where it was named by whoever asks."""
    score: float
    """Cosine of the lexical vectors."""
    tokens: int
    prefix: int
    """It begins with so many tokens of the request."""
    usable: int
    """So many of its leading rows may be built on under the policy."""
    shared: int
    """Tokens of the request that it has in the same order, whoever they are taken from."""
    covers: int
    """Tokens that the planner took from it,"""
    kept: int
    """and those of them that the policy did not recompute."""
    taken: bool
    why: str
    source: str = ""
    """Who has sent it: `own`, `confirmed` by several, or `unconfirmed`; empty where no limit and no
    source asks for that."""
    unconfirmed: int = 0
    """Tokens kept of it behind the exact prefix whose rows were computed behind unconfirmed
    text."""


class Part(msgspec.Struct, frozen=True):
    """Positions `start … stop-1` of the request, all of one fate."""

    start: int
    stop: int
    kind: str
    """`exact`, `continued`, `edited` or `recomputed`."""
    reason: str = ""
    """Which rule recomputes them."""
    donor: str = ""
    source: int = -1
    """Position of the first of them in the donor."""


class Divergence(msgspec.Struct, frozen=True):
    """Where the request leaves the stored prompt with which it begins longest."""

    node: str
    position: int
    request: tuple[int, ...]
    donor: tuple[int, ...]


class Expected(msgspec.Struct, frozen=True):
    """Milliseconds, by the rates that were measured so far."""

    without: float
    """Computing the whole prompt."""
    compute: float
    load: float
    seams: float
    """What placeholder runs cost beside their tokens."""
    saving: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One plan, and why."""

    policy: str
    tokens: int
    declined: str
    generation: int
    by_kind: dict[str, int]
    by_reason: dict[str, int]
    """Recomputed tokens."""
    expected: Expected | None
    divergence: Divergence | None
    candidates: tuple[Candidate, ...]
    parts: tuple[Part, ...]
    steering: Steering | None = None
    """What a bound makes of it; None where it steers nothing."""


Named = dict[str, tuple[Node, list[str]]]
"""Candidates by id, and what has named each."""


class Watched(Nominator):
    """Remembers whom it named, and by what."""

    def __init__(
        self,
        state: NodeState,
        namespace: str,
        named: Named,
        only: Node | None,
        without: Collection[str],
        rank: Rank | None = None,
    ) -> None:
        """`named`: where it writes that down. `only`: name nobody else. `without`: never these
        nodes. `rank`: as `Nominator` has it."""
        super().__init__(state.tree, state.index(namespace), state.lock, rank)
        self._state, self._namespace = state, namespace
        self._only, self._without = only, without
        self.named = named

    def by_prefix(self, tokens: Tokens, policies: Collection[str] = ()) -> list[Node]:
        """As `Nominator`."""
        if self._without:  # the index names the prompt itself
            return self._noted("prefix", partial(self._next_best, tokens))
        return self._noted("prefix", partial(super().by_prefix, tokens, policies))

    def _next_best(self, tokens: Tokens) -> list[Node]:
        """Looked for among all."""
        with self._state.lock:
            others = self._state.of_namespace(self._namespace)
        others = [node for node in others if node.id not in self._without]
        others.sort(key=lambda node: common_prefix(tokens, node.tokens), reverse=True)
        return others[:1]

    def by_words(self, vector: Vector, count: int, most: int = 0) -> list[Node]:
        """As `Nominator`."""
        more = len(self._without)
        return self._noted("words", partial(super().by_words, vector, count + more, most + more))

    def by_passages(self, hashes: Hashes, count: int) -> list[Node]:
        """As `Nominator`."""
        return self._noted(
            "passages", partial(super().by_passages, hashes, count + len(self._without))
        )

    def by_text(self, like: Sequence[Node], count: int) -> list[Node]:
        """As `Nominator`."""
        return self._noted("text", partial(super().by_text, like, count))

    def _noted(self, how: str, find: Callable[[], list[Node]]) -> list[Node]:
        if self._only is not None:
            how, found = "asked", [self._only]
        else:
            found = find()
        found = [node for node in found if node.id not in self._without]
        for node in found:
            ways = self.named.setdefault(node.id, (node, []))[1]
            if how not in ways:
                ways.append(how)
        return found


class Explainer:
    """Explains one request."""

    def __init__(
        self,
        config: StoreConfig,
        request: Tokens,
        policy: ReusePolicy,
        cost: CostModel,
        trust: Trust | None = None,
    ) -> None:
        """`trust`: what the request trusts, if that matters."""
        self._config, self._request = config, request
        self._policy, self._cost = policy, cost
        self._trust = trust
        self.cover: Cover | None = None
        """What covered the request, once it was planned."""
        self.donors: tuple[Node, ...] = ()
        """Those of the plan."""
        self._keep: Mask = np.zeros(len(request), np.bool_)
        self._capped: Mask = self._keep
        """Positions that come from behind too much of another source's text."""
        self._doubtful: Mask = self._keep

    def explain(
        self,
        planner: Planner,
        nominator: Nominator,
        named: Named,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
        delimiters: Collection[int],
    ) -> Explanation:
        """Plan, and say why the plan is so. `named`: where the nominator writes whom it named."""
        planned = planner.plan(
            self._request,
            nominator,
            self._policy,
            self._cost,
            tier_of=tier_of,
            row_bytes=row_bytes,
            delimiters=delimiters,
            watch=self._watch,
            limit=None if self._trust is None else self._limit,
        )
        plan, self.donors = planned.plan, planned.donors
        nodes = {node_id: node for node_id, (node, _) in named.items()}
        for donor in self.cover.donors if self.cover else ():
            nodes.setdefault(donor.id, donor)
        shared = {node.id: align(self._request, node.tokens) for node in nodes.values()}
        kind_of, reason_of = self._fates(plan, nodes, shared, delimiters)
        ways = {node_id: tuple(ways) for node_id, (_, ways) in named.items()}
        candidates = [
            self._candidate(node, ways.get(node.id, ("passages",)), shared[node.id], plan)
            for node in nodes.values()
        ]
        candidates.sort(key=lambda one: (-one.kept, -one.covers, -one.shared))
        return Explanation(
            policy=self._policy.name,
            tokens=len(self._request),
            declined=plan.declined,
            generation=plan.generation,
            by_kind=_counted(kind_of),
            by_reason=_counted(reason_of[reason_of != ""]),
            expected=self._expected(tier_of, row_bytes),
            divergence=self._divergence(list(nodes.values())),
            candidates=tuple(candidates),
            parts=tuple(self._parts(kind_of, reason_of)),
        )

    def _watch(self, cover: Cover, keep: Mask) -> None:
        self.cover, self._keep = cover, keep
        if self._trust is not None:
            self._doubtful = self._trust.doubtful(cover, keep)

    def _limit(self, cover: Cover, keep: Mask) -> None:
        before = keep.copy()
        if self._trust is not None:
            self._trust.limit(cover, keep)
        self._capped = before & ~keep

    # --- what becomes of each token ----------------------------------------------------------

    def _fates(
        self,
        plan: ReusePlan,
        nodes: dict[str, Node],
        shared: dict[str, list[Match]],
        delimiters: Collection[int],
    ) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.str_]]:
        """The kind of reuse of each position, and which rule recomputes it."""
        length, cover = len(self._request), self.cover
        kind_of = np.full(length, "recomputed", "<U10")
        reason_of = np.full(length, EDIT if self._policy.edited else POLICY, "<U16")
        if cover is None:
            if plan.declined != "no_donor":
                reason_of[:] = plan.declined
            return kind_of, reason_of
        for reason, dropped in self._dropped(cover, delimiters):
            reason_of[dropped] = reason
        reason_of[self._capped] = SOURCE
        free = cover.donor_of < 0
        for node in nodes.values():
            usable = usable_length(self._policy, node)
            for start, source, count in shared[node.id] if self._policy.edited else ():
                barred = slice(start + max(0, usable - source), start + count)
                reason_of[barred][free[barred]] = GENERATION
        reason_of[length - 1] = TAIL  # an engine computes it in any case
        if plan.declined:
            reason_of[self._keep] = COST if plan.declined == "no_saving" else plan.declined
            return kind_of, reason_of
        positions = np.arange(length)
        bounds = [positions < cover.exact, positions < cover.in_place]
        kind_of[self._keep] = np.select(bounds, KINDS[:2], KINDS[2])[self._keep]
        reason_of[self._keep] = ""
        return kind_of, reason_of

    def _dropped(self, cover: Cover, delimiters: Collection[int]) -> Iterator[tuple[str, Mask]]:
        """The rules of the policy one after another, and what each recomputes that those before it
        did not."""
        policy, none = self._policy, ()
        bare = msgspec.structs.replace(
            policy, edit_window=0, edit_growth=0.0, tail=1, min_run=1, delimiters=False
        )
        window = msgspec.structs.replace(
            bare, edit_window=policy.edit_window, edit_growth=policy.edit_growth
        )
        tail = msgspec.structs.replace(window, tail=policy.tail)
        runs = msgspec.structs.replace(tail, min_run=policy.min_run)
        before = cover.donor_of >= 0
        for reason, rules, ids in (
            (TAIL, bare, none), (WINDOW, window, none), (TAIL, tail, none), (MIN_RUN, runs, none),
            (DELIMITERS, policy, delimiters),
        ):  # fmt: skip
            kept = kept_positions(
                rules, self._request, cover.donor_of, cover.source_of, cover.in_place, ids
            )
            yield reason, before & ~kept
            before = kept
        yield COST, before & ~self._keep

    def _parts(
        self, kind_of: npt.NDArray[np.str_], reason_of: npt.NDArray[np.str_]
    ) -> Iterator[Part]:
        length, cover = len(self._request), self.cover
        donor_of = np.full(length, -1) if cover is None else cover.donor_of
        source_of = np.full(length, -1) if cover is None else cover.source_of
        reused = kind_of != "recomputed"
        same = (kind_of[1:] == kind_of[:-1]) & (reason_of[1:] == reason_of[:-1])
        follows = (donor_of[1:] == donor_of[:-1]) & (source_of[1:] == source_of[:-1] + 1)
        cuts = np.flatnonzero(~(same & (follows | ~reused[1:]))) + 1
        starts = [0, *cuts.tolist()] if length else []
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            kind, reason = str(kind_of[start]), str(reason_of[start])
            if cover is None or not reused[start]:
                yield Part(start, stop, kind, reason)
                continue
            donor = cover.donors[int(donor_of[start])].id
            yield Part(start, stop, kind, reason, donor, int(source_of[start]))

    # --- candidates --------------------------------------------------------------------------

    def _candidate(
        self, node: Node, ways: tuple[str, ...], shared: list[Match], plan: ReusePlan
    ) -> Candidate:
        cover, usable = self.cover, usable_length(self._policy, node)
        mine = np.zeros(len(self._request), np.bool_)
        if cover is not None:
            for index, donor in enumerate(cover.donors):
                if donor.id == node.id:
                    mine = cover.donor_of == index
        kept = 0 if plan.declined else int(np.count_nonzero(mine & self._keep))
        covers = int(np.count_nonzero(mine))
        common = common_prefix(self._request, node.tokens)
        why = self._taken(kept, plan) if covers else self._passed_over(node, usable, shared)
        return Candidate(
            node=node.id,
            found_by=ways,
            score=round(float(lexical_vector(self._request) @ lexical_vector(node.tokens)), 4),
            tokens=node.length,
            prefix=common,
            usable=usable,
            shared=sum(match.length for match in shared),
            covers=covers,
            kept=kept,
            taken=kept > 0,
            why=why,
            source=WORDS[self._trust.of(node)] if self._trust is not None else "",
            unconfirmed=int(np.count_nonzero(mine & self._doubtful)) if kept else 0,
        )

    def _taken(self, kept: int, plan: ReusePlan) -> str:
        if kept:
            return "taken"
        if plan.declined:
            return f"the plan was declined: {plan.declined}"
        return f"policy {self._policy.name} recomputes all that it covers"

    def _passed_over(self, node: Node, usable: int, shared: list[Match]) -> str:
        policy = self._policy
        if not shared:
            return "no token in common"
        if not policy.edited:
            return f"policy {policy.name} reuses prefixes only, and another has a longer one"
        if not usable:
            lax = "" if continues(policy, node) or node.exact else f", made under {node.policy}"
            return (
                f"its rows are of generation {node.generation}{lax}: policy {policy.name} does not "
                "build on them"
            )
        cover = self.cover
        if cover is None:
            return "its passages are too short to be worth a seam"
        free = cover.donor_of < 0
        new = sum(
            int(np.count_nonzero(free[start : start + min(count, max(0, usable - source))]))
            for start, source, count in shared
        )
        if not new:
            return "has nothing that the donors taken lack"
        if len(cover.donors) >= self._config.max_donors:
            return f"{self._config.max_donors} donors were taken already (max_donors)"
        return f"what it could add ({new:,} tokens) lies in runs too short to be worth a seam"

    # --- the rest ----------------------------------------------------------------------------

    def _divergence(self, nodes: list[Node]) -> Divergence | None:
        if not nodes:
            return None
        request = self._request
        node = max(nodes, key=lambda one: common_prefix(request, one.tokens))
        at = common_prefix(request, node.tokens)
        ours, theirs = request[at : at + _SHOWN], node.tokens[at : at + _SHOWN]
        return Divergence(node.id, at, tuple(ours.tolist()), tuple(theirs.tolist()))

    def _expected(self, tier_of: Callable[[str], str | None], row_bytes: int) -> Expected | None:
        """None where nothing could be reused."""
        keep, cost = self._keep, self._cost
        reused = int(np.count_nonzero(keep))
        if self.cover is None or not reused:
            return None
        pieces = self.cover.pieces(keep)
        spans, blocks = self.cover.spans(pieces)
        tiers: dict[str, int] = {}
        for span in spans:
            tier = tier_of(blocks[span.block]) or "host"
            tiers[tier] = tiers.get(tier, 0) + span.length * row_bytes
        runs = placeholder_runs(pieces)
        load = sum(cost.load[tier].seconds(nbytes) for tier, nbytes in tiers.items())
        whole = cost.prefill.seconds(len(self._request))
        left = cost.prefill.seconds(len(self._request) - reused)
        seams = runs * cost.run_seconds
        values = (whole, left, load, seams, whole - left - load - seams)
        return Expected(*(round(seconds * 1e3, 3) for seconds in values))


def _counted(values: npt.NDArray[np.str_]) -> dict[str, int]:
    names, counts = np.unique(values, return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}
