"""Quality: what scores say of each class of traffic, and which policy its requests get for that.

docs/design/quality.md says what is promised, and what is assumed.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from kvshare_store.bounded import Latest
from kvshare_store.errors import CorruptBlockError, StorageError
from kvshare_store.observability.logs import Seldom
from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.classes import Classes, Known
from kvshare_store.quality.evidence import Evidence, Learned
from kvshare_store.quality.keeping import File, Packed, pack
from kvshare_store.quality.ladder import EXACT, Decision, Seen, Terms, decide, doubted, seen
from kvshare_store.quality.overview import Overview, overview
from kvshare_store.quality.report import (
    ALL,
    ClassReport,
    Counts,
    PolicyReport,
    Wanted,
    extra_rate,
    most_scored_first,
    report_class,
    report_floor,
    scored,
)
from kvshare_store.quality.score import Score
from kvshare_store.quality.traffic import PlannedTraffic
from kvshare_store.quality.trend import Moment, Trends
from kvshare_store.readable import many

log = logging.getLogger("kvshare")

_FLOORS = 4096
"""Namespaces whose controls are kept."""
_WRITE_S = 30.0
"""What was learned in so long may be lost, if it says that a policy is good."""
_RETRY_S = 7 * 86_400.0
"""A class that stays exact since the first rung is beyond the bound is tried again after that."""


class Quality:
    """Thread-safe. Classes that are not known, or were forgotten, begin at `exact`."""

    def __init__(
        self,
        ladder: Sequence[str],
        terms: Terms,
        metrics: Metrics,
        file: File | None = None,
        *,
        meaning: str = "",
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`ladder`: policies from `exact` to the configured one. `meaning`: names what they do, so
        that evidence of policies that meant something else is dropped. `file`: None keeps what is
        learned in memory. `draw`: numbers in 0 to 1, by which requests try the next rung."""
        self.planned = PlannedTraffic()
        self._ladder = tuple(ladder)
        self._terms = terms
        self._metrics = metrics
        self._file = file
        self._meaning = meaning
        self._draw = draw
        self._clock = clock
        self._say = Seldom(log)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._classes = Classes()
        self._trends = Trends()
        self._floors: Latest[str, Evidence] = Latest(_FLOORS)
        """Controls, by namespace."""
        self._written = clock()
        self._changed = False
        """Since the file was written."""
        self._foreign = False
        """The file has what is not here: it could not be read, or is of other policies."""
        self._read()

    @property
    def steers(self) -> bool:
        """Whether there is a bound."""
        return self._terms.bound > 0

    @property
    def bound(self) -> float:
        """The extra rate of divergence that the operator accepts; 0: any."""
        return self._terms.bound

    def reload(self, terms: Terms) -> None:
        """Go on by another bound or confidence."""
        with self._lock:
            self._terms = terms
            for _, _, known in self._classes:
                known.decisions.clear()

    # --- what requests get -------------------------------------------------------------------

    def rung(self, namespace: str, traffic: str, configured: str) -> str:
        """The policy for one more request of a class, `configured` at most. It counts as served."""
        if not self.steers or configured not in self._ladder[EXACT + 1 :]:
            return configured
        with self._lock:
            known = self._classes.get(namespace, traffic)
            made = self._decision(namespace, known, self._ladder.index(configured))
            chosen = made.tried if self._draw() < made.share else made.rung
            if known is not None and chosen != EXACT:
                known.served()
                self._changed = True  # silence counts across restarts too
        return self._ladder[chosen]

    def would(self, namespace: str, traffic: str, configured: str) -> tuple[str, str, float] | None:
        """As `rung`, but nothing counts as served: the rung, what is tried or empty, and by which
        share of requests. None without a bound, or where the policy has nothing to choose from."""
        if not self.steers or configured not in self._ladder[EXACT + 1 :]:
            return None
        with self._lock:
            known = self._classes.get(namespace, traffic)
            return self._named(namespace, known, self._ladder.index(configured))

    def _decision(self, namespace: str, known: Known | None, top: int) -> Decision:
        """`top`: the highest rung that the request may get."""
        floor, ladder = self._floors.get(namespace) or Evidence(), self._ladder[: top + 1]
        if known is None:
            return decide(Learned(), floor, ladder, self._terms)
        if known.controls != floor.diverged.count:
            known.decisions.clear()
            known.controls = floor.diverged.count
        made = known.decisions.get(top)
        # also a clock that was set back must not put it off for longer
        if made == Decision() and abs(self._clock() - known.learned.scored) > _RETRY_S:
            known.learned.forget()
            known.decisions.clear()
            made = None
        if made is None:
            made = known.decisions[top] = decide(known.learned, floor, ladder, self._terms)
        return made

    @property
    def _top(self) -> int:
        return len(self._ladder) - 1

    # --- what scores say ---------------------------------------------------------------------

    def observe(self, score: Score) -> None:
        """One more answer was scored. What is of no policy of the ladder is ignored."""
        if not score.control and score.policy not in self._ladder[EXACT + 1 :]:
            return
        with self._lock:
            if score.control:
                self._floor(score.namespace).add(score)
            tightened = not score.control and self._learn(score)
            diverged = self.steers and not score.control and score.diverged is not None
            self._changed = True
        if tightened:
            self._metrics.add("quality_tightened")
        if tightened or diverged or self._due():
            self._write()

    def keep(self) -> None:
        """Write down what has changed, if it is time. Called now and then."""
        if self._changed and self._due():
            self._write()

    def _due(self) -> bool:
        return not 0 <= self._clock() - self._written < _WRITE_S

    def _floor(self, namespace: str) -> Evidence:
        found = self._floors[namespace] = self._floors.get(namespace) or Evidence()
        return found

    def _learn(self, score: Score) -> bool:
        """Whether the class has become stricter."""
        found = self._classes.get(score.namespace, score.traffic)
        known = found or self._classes.add(score.namespace, score.traffic, Learned())
        learned, terms = known.learned, self._terms
        before = self._decision(score.namespace, known, self._top).rung if self.steers else EXACT
        floor = self._floors.get(score.namespace) or Evidence()
        least = floor.diverged.interval(terms.each()).low
        evidence, allowed = learned.of(score.policy), terms.bound + least
        evidence.add(score, allowed if self.steers else 1.0)
        learned.scored = self._clock()
        if score.greedy:  # others say nothing of divergence
            learned.unscored = 0
            self._note(score, learned, floor)
        known.decisions.clear()
        # also where it is only tried: what was learned before a change says how often
        if doubted(evidence, terms) and evidence.diverged.mean <= allowed:
            learned.forget()
        if before == EXACT:
            return False
        after = self._decision(score.namespace, known, self._top).rung
        if after < before:
            now, was = self._ladder[after], self._ladder[before]
            text = f"class {score.traffic} is {now} now, was {was}: it may be beyond quality_bound"
            self._say.warn("tightened", text, logging.INFO)
        return after < before

    def _note(self, score: Score, learned: Learned, floor: Evidence) -> None:
        """Remember what is known now, for the trend."""
        extra = extra_rate(learned, score.policy, floor, self._terms)
        moment = Moment(learned.scored, learned.of(score.policy).diverged.count, extra)
        self._trends.add(score.namespace, score.traffic, score.policy, moment)

    # --- what people ask ---------------------------------------------------------------------

    def report(self, wanted: Wanted = ALL) -> list[ClassReport]:
        """Classes, those with the most scored answers first. No request waits for all of it."""
        found = most_scored_first(self._meant(wanted))
        return [self._report(*one, wanted) for one in found[wanted.part]]

    def _meant(self, wanted: Wanted) -> list[tuple[str, str, Known]]:
        with self._lock:
            classes = list(self._classes)
        return wanted.meant([*classes, *self._unscored(classes)])

    def _unscored(
        self, classes: Sequence[tuple[str, str, Known]]
    ) -> Iterator[tuple[str, str, Known]]:
        """Classes that a bound steers already, and of which no answer was scored."""
        known = {(namespace, traffic) for namespace, traffic, _ in classes}
        for namespace, traffic in self.planned.classes() if self.steers else ():
            if (namespace, traffic) not in known:
                yield namespace, traffic, Known(Learned())

    def _report(self, namespace: str, traffic: str, known: Known, wanted: Wanted) -> ClassReport:
        with self._lock:
            floor = self._floors.get(namespace) or Evidence()
            named = self._named(namespace, known, self._top)
            now, of = self._clock(), self._trends.of
            return report_class(
                namespace, traffic, known.learned, floor, named, self._terms,
                lambda policy: of(namespace, traffic, policy, now) if wanted.trends else (),
            )  # fmt: skip

    def floors(self, wanted: Wanted) -> list[tuple[str, PolicyReport]]:
        """What controls show, by namespace, those that were scored last first."""
        with self._lock:
            found = [name for name in reversed(self._floors) if name.startswith(wanted.namespace)]
            shown = found[wanted.part]
            return [(name, report_floor(self._floors[name], self._terms)) for name in shown]

    def counts(self, wanted: Wanted) -> Counts:
        """How many are meant."""
        with self._lock:
            spaces = list(self._floors)
        meant = self._meant(wanted)
        return Counts(
            len(meant),
            sum(scored(known.learned) > 0 for _, _, known in meant),
            sum(name.startswith(wanted.namespace) for name in spaces),
        )

    def knows(self, namespace: str) -> bool:
        """Whether any answer in the namespace of this digest was scored."""
        with self._lock:
            return namespace in self._classes or namespace in self._floors

    def overview(self) -> Overview:
        """All classes together. No request waits for all of it."""
        with self._lock:
            classes, terms = list(self._classes), self._terms
        known = [*classes, *self._unscored(classes)]
        return overview(self._ladder, terms, [self._seen(at, one, terms) for at, _, one in known])

    def _seen(self, namespace: str, known: Known, terms: Terms) -> Seen:
        with self._lock:
            return seen(known.learned, self._floors.get(namespace) or Evidence(), terms)

    def _named(self, namespace: str, known: Known | None, top: int) -> tuple[str, str, float]:
        """The rung, what is tried, and by which share of requests."""
        if not self.steers:
            return "", "", 0.0
        made = self._decision(namespace, known, top)
        tried = self._ladder[made.tried] if made.tried != made.rung else ""
        return self._ladder[made.rung], tried, made.share

    # --- restarts ----------------------------------------------------------------------------

    def forget(self, namespace: str) -> None:
        """Nothing of a namespace is kept, neither here nor in the file."""
        self.planned.forget(namespace)
        with self._lock:
            known = self._classes.forget(namespace)
            known = self._floors.pop(namespace, None) is not None or known
            self._trends.forget(namespace)
        if known or self._foreign or self._changed:
            self._write()

    def close(self) -> None:
        """Write down what was learned since the last time."""
        if self._changed:
            self._write()

    def _read(self) -> None:
        """A file that cannot be read, or is of other policies, is as none: all classes begin
        anew."""
        try:
            kept = self._file.read() if self._file is not None else None
        except (CorruptBlockError, OSError) as error:
            self._metrics.error(CorruptBlockError.kind)
            log.warning("kvshare: what was learned of quality is lost, begins anew: %s", error)
            self._foreign = True
            return
        if kept is None:
            return
        if kept.ladder != self._meaning:
            self._foreign = True
            log.warning(
                "kvshare: answers of %s were scored under another policy or other settings of it; "
                "they do not count now, and the next score replaces them",
                many(len(kept.classes), "namespace"),
            )
            return
        self._floors.update(kept.floors)
        self._classes.fill(kept.classes)

    def _kept(self) -> Packed:
        """What is to be written. No request waits for all of it, so each class and each floor is
        as it was at some moment of this call: what changes meanwhile is written the next time."""
        with self._lock:
            self._changed, self._written = False, self._clock()
            classes, floors = self._classes.learned(), dict(self._floors)
        return Packed(
            self._meaning,
            {
                namespace: {traffic: self._encoded(one) for traffic, one in of_namespace.items()}
                for namespace, of_namespace in classes.items()
            },
            {namespace: self._encoded(one) for namespace, one in floors.items()},
        )

    def _encoded(self, one: Learned | Evidence) -> msgspec.Raw:
        with self._lock:
            return pack(one)

    def _write(self) -> None:
        if self._file is None:
            return
        with self._writing:
            encoded = self._file.encode(self._kept())
            try:
                self._file.write(encoded)
                self._foreign = False
            except OSError as error:
                self._changed = True
                self._metrics.error(StorageError.kind)
                self._say.warn("quality", f"what was learned of quality was not written: {error}")
