"""The planner: nominate donors, align, apply the policy, weigh the cost. It changes nothing, and
holds no lock but for the moments in which donors are nominated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import (
    GRAM,
    align,
    common_prefix,
    gram_hashes,
    occur_in,
    passages,
)
from kvshare_store.lookup.cost import CostModel
from kvshare_store.lookup.embedders import lexical_vector
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.policy import ReusePolicy, kept_positions, runs_of
from kvshare_store.plan import Run, Span
from kvshare_store.tree.edits import Match, Tokens
from kvshare_store.tree.node import Node, spans_from

_PRIMARIES = 3
"""Candidates aligned in full before one becomes the first donor."""
_ENOUGH = 0.95
"""A first donor that covers this much needs no further candidates."""
_MOSTLY = 0.5
"""Neighbours by text are asked for when the others leave more than this uncovered."""


class Draft(NamedTuple):
    """A plan before its blocks are leased. `spans[i].block` indexes `blocks`."""

    exact: int = 0
    spans: tuple[Span, ...] = ()
    blocks: tuple[str, ...] = ()
    donors: tuple[str, ...] = ()
    generation: int = 0
    saving_ms: float = 0.0
    tier: str = "host"
    """The slowest tier that some of the blocks come from."""
    declined: str = ""


class Cover:
    """Which donor's which position covers each position of the request."""

    def __init__(self, request: Tokens) -> None:
        self.request = request
        self.donors: list[Node] = []
        self.donor_of: npt.NDArray[np.int64] = np.full(len(request), -1, np.int64)
        self.source_of: npt.NDArray[np.int64] = np.full(len(request), -1, np.int64)
        self.exact = 0
        self._grams = gram_hashes(request)
        self._shared: dict[str, npt.NDArray[np.bool_]] = {}

    @property
    def covered(self) -> int:
        """Positions that some donor covers."""
        return int(np.count_nonzero(self.donor_of >= 0))

    def shared_grams(self, node: Node) -> npt.NDArray[np.bool_]:
        """Whether the gram from each position of the request on occurs anywhere in the node."""
        if node.id not in self._shared:
            self._shared[node.id] = occur_in(self._grams, gram_hashes(node.tokens))
        return self._shared[node.id]

    def add(self, node: Node, matches: Iterable[Match], shortest: int = 1) -> None:
        """Let `node` cover what is still uncovered, in runs of at least `shortest`."""
        index = self._index(node)
        for start, source, length in matches:
            free = self.donor_of[start : start + length] < 0
            for run in runs_of(free):
                if run.length >= shortest:
                    at = slice(start + run.start, start + run.stop)
                    self.donor_of[at] = index
                    self.source_of[at] = np.arange(source + run.start, source + run.stop)

    def add_exact(self, node: Node, length: int) -> None:
        """The first `length` positions come from the same positions of `node`, bit for bit."""
        self.exact = length
        self.donor_of[:length] = self._index(node)
        self.source_of[:length] = np.arange(length)

    def _index(self, node: Node) -> int:
        for index, donor in enumerate(self.donors):
            if donor.id == node.id:
                return index
        self.donors.append(node)
        return len(self.donors) - 1


class Planner:
    """Makes plans of immutable nodes. Thread-safe."""

    def __init__(self, config: StoreConfig) -> None:
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
        count = self._config.candidates
        nodes = nominator.by_words(lexical_vector(cover.request), count)
        self._cover_from(cover, self._usable(nodes, policy, cover), policy)
        if cover.covered < _MOSTLY * len(cover.request):
            seen = {node.id for node in nodes}
            more = [node for node in nominator.by_text(nodes, count) if node.id not in seen]
            if more:
                self._cover_from(cover, self._usable(more, policy, cover), policy)

    def _usable(self, nodes: list[Node], policy: ReusePolicy, cover: Cover) -> list[Node]:
        """Nodes that may be built on. The exact-prefix donor comes first: it is here already."""
        distinct = {node.id: node for node in (*cover.donors, *nodes)}
        return [node for node in distinct.values() if node.generation < policy.max_generation]

    def _cover_from(self, cover: Cover, nodes: list[Node], policy: ReusePolicy) -> None:
        """The node that covers most becomes the first donor; others fill what it leaves."""
        self._take_best_prefix(cover, nodes)
        aligned: list[tuple[int, Node, list[Match]]] = []
        for node in nodes:
            if not cover.shared_grams(node).any():
                continue
            matches = align(cover.request, node.tokens)
            useful = sum(m.length for m in matches if m.length >= policy.min_run)
            aligned.append((useful, node, matches))
            if useful >= _ENOUGH * len(cover.request) or len(aligned) == _PRIMARIES:
                break
        if not aligned:
            return
        _, first, matches = max(aligned, key=lambda entry: entry[0])
        cover.add(first, matches)
        # text from elsewhere is worth its seam only in runs that outlast the window after it
        shortest = max(2 * GRAM, 2 * policy.edit_window, policy.min_run)
        for node in (first, *(node for node in nodes if node is not first)):
            gaps = [gap for gap in runs_of(cover.donor_of < 0) if gap.length >= shortest]
            if not gaps or len(cover.donors) >= self._config.max_donors:
                return
            _fill_gaps(cover, node, gaps, shortest)

    # --- the answer --------------------------------------------------------------------------

    def _weigh(
        self,
        cover: Cover,
        keep: npt.NDArray[np.bool_],
        cost: CostModel,
        tier_of: Callable[[str], str | None],
        row_bytes: int,
    ) -> Draft:
        spans, blocks, used = _spans(cover, keep)
        if not spans:
            return Draft(declined="nothing_kept")
        tier_bytes: dict[str, int] = {}
        for span in spans:
            tier = tier_of(blocks[span.block])
            if tier is None:
                return Draft(declined="blocks_gone")
            tier_bytes[tier] = tier_bytes.get(tier, 0) + span.length * row_bytes
        reused = sum(span.length for span in spans)
        runs = len(runs_of(~keep[: spans[-1].stop]))
        saving = cost.saving_ms(reused, runs, tier_bytes)
        if saving < self._config.min_saving_ms:
            return Draft(declined="no_saving")
        kept_donors = cover.donor_of[keep]
        edited = np.unique(kept_donors[np.flatnonzero(keep) >= cover.exact])
        generation = 1 + max(cover.donors[d].generation for d in edited) if len(edited) else 0
        by_use = sorted(used, key=lambda donor: -int(np.count_nonzero(kept_donors == donor)))
        return Draft(
            exact=min(cover.exact, spans[-1].stop),
            spans=tuple(spans),
            blocks=tuple(blocks),
            donors=tuple(cover.donors[donor].id for donor in by_use),
            generation=generation,
            saving_ms=saving,
            tier=next((slow for slow in ("remote", "disk") if slow in tier_bytes), "host"),
        )


def _fill_gaps(cover: Cover, node: Node, gaps: list[Run], shortest: int) -> None:
    """Let `node` fill gaps from anywhere in it: text that moved, or that only this donor has."""
    shared = cover.shared_grams(node)
    for gap in gaps:
        for run in runs_of(shared[gap.start : gap.stop - GRAM + 1]):
            start, stop = gap.start + run.start, gap.start + run.stop + GRAM - 1
            if stop - start >= shortest:
                found = passages(cover.request[start:stop], node.tokens, shortest)
                cover.add(node, [m._replace(start=start + m.start) for m in found], shortest)


def _spans(cover: Cover, keep: npt.NDArray[np.bool_]) -> tuple[list[Span], list[str], list[int]]:
    """Spans of the kept positions, the blocks they index, and the donors they come from."""
    spans: list[Span] = []
    blocks: dict[str, int] = {}
    used: dict[int, None] = {}
    for start, stop in _pieces(cover, keep):
        donor = int(cover.donor_of[start])
        node = cover.donors[donor]
        used[donor] = None
        source = int(cover.source_of[start])
        for span in spans_from(node, source, stop - start, start, exact=start < cover.exact):
            block = blocks.setdefault(node.blocks[span.block], len(blocks))
            spans.append(Span(span.start, span.length, span.source, block, span.row, span.exact))
    return spans, list(blocks), list(used)


def _pieces(cover: Cover, keep: npt.NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    """Kept runs, cut where the donor or the order in it changes and where the exact prefix ends."""
    breaks = np.zeros(len(keep), np.bool_)
    breaks[1:] = (cover.donor_of[1:] != cover.donor_of[:-1]) | (
        cover.source_of[1:] != cover.source_of[:-1] + 1
    )
    if cover.exact < len(breaks):
        breaks[cover.exact] = True
    for run in runs_of(keep):
        cuts = [
            run.start,
            *(run.start + 1 + np.flatnonzero(breaks[run.start + 1 : run.stop])),
            run.stop,
        ]
        for start, stop in pairwise(cuts):
            yield int(start), int(stop)
