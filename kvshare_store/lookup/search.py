"""The search for donors of one request: who is asked, in which order, and for what."""

from __future__ import annotations

import math
from functools import partial

from kvshare_store.config import StoreConfig
from kvshare_store.lookup.align import Outline, between, outline
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.effort import Effort
from kvshare_store.lookup.equal_runs import common_prefix, passages
from kvshare_store.lookup.nominate import Nominator
from kvshare_store.lookup.places import KnownPlaces, guess
from kvshare_store.lookup.policy import (
    LEAST_WINDOW,
    ReusePolicy,
    continues,
    runs_of,
    usable_generation,
    usable_length,
    usable_tokens,
)
from kvshare_store.lookup.trust import OTHER
from kvshare_store.nodes.edits import Match
from kvshare_store.nodes.grams import ANCHORED, GRAM
from kvshare_store.nodes.index import LONG
from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Run

_ENOUGH = 0.95
"""A first donor that covers this much needs no further candidates."""
_ENOUGH_OF_SHORT, _OF_SHORT = 0.8, 3
"""The same for the guess about a short prompt, which counts eight tokens too few at each edit. So
many candidates are looked at first: one that has nearly all may stand behind one in pieces."""
_FOR_GAPS = 0.3
"""Share of the effort that is kept for filling the gaps of the first donor."""
_MOSTLY = 0.5
"""A prompt of which less is covered gets a second look."""
_WIDER = 4
"""So many times as many candidates are looked at by then."""
_BETTER = 1.02
"""A guess is no surer than this: of nodes that seem to have as much the first is taken."""
_LAST_MOVE = 0.16
"""Rows that may be moved only once more count as so much less, as a share; with each move that they
last longer as half of that. What is used up must be computed anew."""
_PRIMARIES = 3
"""Candidates that are aligned before one becomes the first donor, where grams say too little: short
prompts under a policy that keeps runs without a gram."""
_HASHED = 32
"""Cells that hashing a token costs."""


class Search:
    """Fills a cover with what stored prompts have of its request."""

    def __init__(
        self,
        cover: Cover,
        nominator: Nominator,
        policy: ReusePolicy,
        config: StoreConfig,
        places: KnownPlaces,
        effort: Effort,
    ) -> None:
        self._cover = cover
        self._nominator = nominator
        self._policy = policy
        self._config = config
        self._places = places
        self._effort = effort
        self._guesses: dict[str, int] = {}
        self._later: list[tuple[Node, Run, Run]] = []
        """Pieces of the request and of a first donor that are not aligned yet."""
        # text from elsewhere is worth its seam only in runs that outlast the window after it
        self._shortest = max(2 * GRAM, 2 * policy.edit_window, policy.min_run)
        window = LEAST_WINDOW if policy.edit_growth else policy.edit_window
        self._lasting = policy.min_run + window

    def take_prefix(self, nodes: list[Node]) -> None:
        """The longest exact prefix, and how much further an edited prompt goes on with the same
        tokens. Tokens decide: the chain's hashes only nominated."""
        cover = self._cover
        longest = len(cover.request) - 1
        head = cover.request[: cover.exact + 1].tobytes()
        for node in nodes:
            if not node.token_bytes.startswith(head):
                continue  # no longer prefix in common
            common = min(common_prefix(cover.request, node.tokens), longest)
            exact = min(common, node.exact_rows)
            if exact > cover.exact:
                cover.add_exact(node, exact)
            if common > max(exact, cover.in_place) and continues(self._policy, node):
                cover.add_continued(node, common)

    def edited(self) -> None:
        """Cover what does not stay in place.

        A prompt that goes on from a stored one needs no candidates but for what is new, unless rows
        of that one would be moved where there may be better ones. Most others are served by the
        first few; the rest get a second look.
        """
        cover, count = self._cover, self._config.candidates
        in_place = cover.in_place >= _ENOUGH * len(cover.request)
        continued = [one for one in self._usable(cover.donors) if in_place or self._best(one)]
        served = self._take_donor(continued, _ENOUGH)
        if served:
            self._fill_gaps(continued)
        if not served or cover.gaps(self._shortest):
            nodes = self._candidates(served)
            self._cover_from(self._usable([*cover.donors, *nodes]), served)
            if cover.covered < _MOSTLY * len(cover.request):
                seen = {node.id for node in (*nodes, *continued)}
                more = self._nominator.by_words(cover.words, _WIDER * count)
                more += self._nominator.by_text(nodes, count)
                self._cover_from(self._usable([node for node in more if node.id not in seen]))
        cover.add_what_waits()
        self._align_the_rest()

    def _candidates(self, served: bool) -> list[Node]:
        """For long prompts those with the passages that nobody covers yet, where there are any; for
        others by words. The words of a long prompt that is served do not tell what is new in it.
        The turn before one that has just become long is known by its words alone."""
        cover, nominator, count = self._cover, self._nominator, self._config.candidates
        length, found = len(cover.request), list[Node]()
        if length >= LONG:
            anchors = cover.sought.inside(cover.gaps(GRAM), ANCHORED).hashes
            found = nominator.by_passages(anchors, count)
            if served or (found and length >= 2 * LONG):
                return found
        return found + nominator.by_words(cover.words, count, _WIDER * count)

    def _usable(self, nodes: list[Node]) -> list[Node]:
        """Nodes that have rows to build on, each once; none but donors where there are as many of
        them as may be."""
        if len(self._cover.donors) >= self._config.max_donors:
            nodes = self._cover.donors
        distinct = {node.id: node for node in nodes}.values()
        usable = [node for node in distinct if usable_length(self._policy, node)]
        return self._longest(usable) if len(self._cover.request) >= LONG else usable

    def _longest(self, nodes: list[Node]) -> list[Node]:
        """Those of the nodes that no other one goes on from: a conversation is stored at each of
        its turns, and the last one has all that the others have."""
        longest: list[Node] = []
        for node in sorted(nodes, key=lambda node: -usable_length(self._policy, node)):
            if not any(self._goes_on(other, node) for other in longest):
                longest.append(node)
        return [node for node in nodes if node in longest]

    def _goes_on(self, node: Node, before: Node) -> bool:
        """Whether the node has all that may be used of the one before, in rows that are as good."""
        policy, rank = self._policy, self._nominator.rank
        return (
            usable_generation(policy, node) <= usable_generation(policy, before)
            and rank(node) <= rank(before)
            and node.token_bytes.startswith(before.token_bytes[: 4 * usable_length(policy, before)])
        )

    def _cover_from(self, nodes: list[Node], served: bool = False) -> None:
        if not served:
            self._take_donor(nodes)
        self._fill_gaps(nodes)

    # --- the first donor ---------------------------------------------------------------------

    def _take_donor(self, nodes: list[Node], share: float = 0.0) -> bool:
        """The node that seems to have most of what is sought is aligned with the request, if at
        least this share of the request is covered then. Whether it is."""
        cover = self._cover
        self._effort.reserve = _FOR_GAPS
        self.take_prefix(nodes)
        ranked = self._ranked(nodes)
        tokens = self._guesses[ranked[0].id] if ranked else 0
        if cover.sought.start + tokens < share * len(cover.request):
            return False
        few = len(cover.request) < LONG and self._policy.min_run < GRAM
        found = [(self._outline(node), node) for node in ranked[: _PRIMARIES if few else 1]]
        if found:
            best, donor = max(found, key=lambda each: self._useful(each[0].matches, each[1]))
            sure, doubtful = self._sorted_out(best.matches)
            cover.add(donor, sure)
            cover.add(donor, best.moved, self._shortest)
            cover.add_later(donor, doubtful)
            self._later += [(donor, *piece) for piece in best.pieces]
        return True

    def _ranked(self, nodes: list[Node]) -> list[Node]:
        """Nodes that share text with what is sought, that with most of it first, where the rows of
        many generations count as less. Nodes of a higher rank come first only with more of it.
        Looks no further than to the best rows of nearly all."""
        length = len(self._cover.request)
        share, least = (_ENOUGH, 1) if length >= LONG else (_ENOUGH_OF_SHORT, _OF_SHORT)
        enough, most = share * (length - self._cover.sought.start), 0
        ranked: list[Node] = []
        for node in nodes:
            tokens = self._guess(node)
            if tokens:
                ranked.append(node)
            if self._best(node):
                most = max(most, tokens)
            if most >= enough and len(ranked) >= least:
                break
        if not ranked:
            return []
        rank = self._nominator.rank
        _, first = min((self._about(node), rank(node)) for node in ranked)

        def order(node: Node) -> tuple[bool, int, int, int]:
            its, generation = rank(node), usable_generation(self._policy, node)
            return its > first, self._about(node, self._worn(generation)), its, generation

        return sorted(ranked, key=order)

    def _best(self, node: Node) -> bool:
        """Whether no other rows of the same text would be better than these: they are exact, and
        nobody is trusted more."""
        return not usable_generation(self._policy, node) and not self._nominator.rank(node)

    def _about(self, node: Node, less: float = 0.0) -> int:
        """The lower, the more the node seems to have, of which this share does not count; equal for
        nodes that seem to have about as much."""
        tokens = min((1 - less) * self._guesses[node.id], self._trusted(node))
        return -int(math.log(max(1.0, tokens), _BETTER))

    def _trusted(self, node: Node) -> float:
        """How many of the node's rows count: what is cut off in the end must not keep out a donor
        that has less."""
        doubtful = self._nominator.rank(node) >= OTHER
        return len(self._cover.request) * (self._config.unconfirmed_share if doubtful else 1.0)

    def _worn(self, generation: int) -> float:
        """Share by which rows of this generation count as less."""
        return float(_LAST_MOVE * 0.5 ** max(0, self._policy.max_generation - generation - 1))

    def _guess(self, node: Node) -> int:
        """How much the node seems to have; 0 if looking would be too much work."""
        if node.id not in self._guesses:
            if not self._places.known(node) and not self._effort.spend(_HASHED * node.length):
                return 0
            usable = usable_length(self._policy, node)
            self._guesses[node.id] = guess(self._cover.sought, self._places.of(node), usable)
        return self._guesses[node.id]

    def _outline(self, donor: Node) -> Outline:
        return outline(
            self._cover.request,
            usable_tokens(self._policy, donor),
            self._effort,
            least=self._policy.min_run,
            wide=self._shortest,
            ours=self._cover.sought,
            theirs=partial(self._places.of, donor),
        )

    def _useful(self, matches: list[Match], donor: Node) -> float:
        """Positions behind what stays in place that runs cover which are long enough."""
        start, least = self._cover.in_place, self._policy.min_run
        runs = ((max(at, start), at + length) for at, _, length in matches if length >= least)
        return min(sum(max(0, stop - first) for first, stop in runs), self._trusted(donor))

    def _sorted_out(self, found: list[Match]) -> tuple[list[Match], list[Match]]:
        """Matches that other donors cannot better, and short ones that are all there is in a
        stretch of the request where a passage from elsewhere might be."""
        lasting, length = self._lasting, len(self._cover.request)
        sure: list[Match] = []
        doubtful: list[Match] = []
        few: list[Match] = []
        at = 0
        for match in (*found, Match(length, 0, 0)):
            if match.length < lasting and match.start < length:
                few.append(match)
                continue
            (doubtful if match.start - at >= self._shortest else sure).extend(few)
            sure.append(match)
            few, at = [], match.start + match.length
        return sure[:-1], doubtful

    # --- what it leaves ----------------------------------------------------------------------

    def _fill_gaps(self, nodes: list[Node]) -> None:
        """Passages of the nodes fill what the first donor leaves; of nodes that seem to have no
        more than phrases none is looked for."""
        cover, shortest = self._cover, self._shortest
        self._effort.reserve = 0.0
        gaps = cover.gaps(shortest)
        first = cover.donors[-1].id if cover.donors else ""
        for node in sorted(nodes, key=lambda node: node.id != first):
            if not gaps or len(cover.donors) >= self._config.max_donors:
                return
            if self._guesses.get(node.id, GRAM + 1) <= GRAM:
                continue
            found = passages(
                cover.request,
                usable_tokens(self._policy, node),
                gaps,
                shortest,
                self._effort,
                ours=cover.sought,
                theirs=partial(self._places.of, node),
            )
            if found:
                cover.add(node, found, shortest)
                gaps = cover.gaps(shortest)

    def _align_the_rest(self) -> None:
        """What passages leave of the pieces that were not aligned with their donors yet, where it
        may hold a run that outlasts the window before it."""
        cover, policy = self._cover, self._policy
        for donor, ours, theirs in self._later:
            tokens = usable_tokens(policy, donor)
            for start, stop in runs_of(cover.donor_of[slice(*ours)] < 0, self._lasting):
                gap = Run(ours.start + start, ours.start + stop)
                given = cover.request, tokens, gap, theirs, self._effort, policy.min_run
                cover.add(donor, between(*given))
