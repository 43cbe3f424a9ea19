"""Quality: what scores say of each class of traffic, and which policy its requests get for that.

docs/design/quality.md says what is promised, and what is assumed.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from kvshare_store.errors import CorruptBlockError, StorageError
from kvshare_store.logs import Seldom
from kvshare_store.metrics import Metrics
from kvshare_store.quality.evidence import Evidence, Learned
from kvshare_store.quality.keeping import File, Kept
from kvshare_store.quality.ladder import EXACT, STALE, Decision, Terms, decide, doubted
from kvshare_store.quality.report import ClassReport, report_class
from kvshare_store.quality.score import Score
from kvshare_store.quality.traffic import PlannedTraffic

log = logging.getLogger("kvshare")

_CLASSES = 4096
_OF_NAMESPACE = 256
"""Classes of one namespace, so that a tenant cannot push out what was learned of all others."""
_WRITE_S = 30.0
"""What was learned in so long may be lost, if it says that a policy is good."""
_RETRY_S = 7 * 86_400.0
"""A class that stays exact since the first rung is beyond the bound is tried again after that."""


class _Class(msgspec.Struct):
    """A class, and what was decided by its evidence."""

    learned: Learned
    decision: Decision | None = None
    controls: int = 0
    """How many there were then."""


class Quality:
    """Thread-safe. The least recently used classes are forgotten, and begin at `exact` again."""

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
        self._classes: OrderedDict[str, OrderedDict[str, _Class]] = OrderedDict()
        """By namespace and traffic; the most recently used last."""
        self._count = 0
        self._floors: OrderedDict[str, Evidence] = OrderedDict()
        self._written = clock()
        self._changed = False
        self._read()

    @property
    def steers(self) -> bool:
        """Whether there is a bound."""
        return self._terms.bound > 0

    def reload(self, terms: Terms) -> None:
        """Go on by another bound or confidence."""
        with self._lock:
            self._terms = terms
            for known in self._classes.values():
                for one in known.values():
                    one.decision = None

    # --- what requests get -------------------------------------------------------------------

    def rung(self, namespace: str, traffic: str, configured: str) -> str:
        """The policy for one more request of a class, `configured` at most. It counts as served."""
        if not self.steers or configured not in self._ladder:
            return configured
        top = self._ladder.index(configured)
        with self._lock:
            known = self._known(namespace, traffic)
            decision = self._decision(namespace, known)
            chosen = decision.rung
            if decision.tried <= top and self._draw() < decision.share:
                chosen = decision.tried
            chosen = min(chosen, top)
            if known is not None and chosen != EXACT:
                self._count_served(known)
        return self._ladder[chosen]

    def _count_served(self, known: _Class) -> None:
        known.learned.unscored += 1
        if known.learned.unscored == STALE:
            known.decision = None

    def _known(self, namespace: str, traffic: str) -> _Class | None:
        of_namespace = self._classes.get(namespace)
        known = of_namespace.get(traffic) if of_namespace is not None else None
        if of_namespace is not None and known is not None:
            of_namespace.move_to_end(traffic)
            self._classes.move_to_end(namespace)
        return known

    def _decision(self, namespace: str, known: _Class | None) -> Decision:
        floor = self._floors.get(namespace) or Evidence()
        if known is None:
            return decide(Learned(), floor, self._ladder, self._terms)
        made, controls = known.decision, floor.diverged.count
        if made is None or known.controls != controls or self._retried(known, made):
            made = decide(known.learned, floor, self._ladder, self._terms)
            known.decision, known.controls = made, controls
        return made

    def _retried(self, known: _Class, made: Decision) -> bool:
        stays = made == Decision(EXACT, EXACT) and len(self._ladder) > 1
        late = stays and self._clock() - known.learned.scored > _RETRY_S
        if late:
            known.learned.forget()
        return late

    # --- what scores say ---------------------------------------------------------------------

    def observe(self, score: Score) -> None:
        """One more answer was scored. What is of no policy of the ladder is ignored."""
        with self._lock:
            if score.control:
                self._floor(score.namespace).add(score)
            elif score.policy in self._ladder[EXACT + 1 :]:
                tightened = self._learn(score)
            else:
                return
            self._changed = True
            due = self._clock() - self._written >= _WRITE_S
        if due or (not score.control and tightened):
            self._write()

    def _floor(self, namespace: str) -> Evidence:
        found = self._floors.setdefault(namespace, Evidence())
        self._floors.move_to_end(namespace)
        if len(self._floors) > _CLASSES:
            self._floors.popitem(last=False)
        return found

    def _learn(self, score: Score) -> bool:
        """Whether the class has become stricter."""
        known = self._known(score.namespace, score.traffic) or self._new(score)
        learned, terms = known.learned, self._terms
        before = self._decision(score.namespace, known).rung if self.steers else EXACT
        floor = self._floors.get(score.namespace) or Evidence()
        least = floor.diverged.interval(terms.each()).low
        evidence = learned.of(score.policy)
        evidence.add(score, terms.bound + least if self.steers else 1.0)
        learned.unscored, learned.scored, known.decision = 0, self._clock(), None
        if not self.steers or before == EXACT:
            return False
        if score.policy == self._ladder[before] and doubted(evidence, terms):
            learned.forget()
        tightened = self._decision(score.namespace, known).rung < before
        if tightened:
            self._metrics.add("quality_tightened")
        return tightened

    def _new(self, score: Score) -> _Class:
        of_namespace = self._classes.setdefault(score.namespace, OrderedDict())
        self._classes.move_to_end(score.namespace)
        known = of_namespace[score.traffic] = _Class(Learned())
        self._count += 1
        if len(of_namespace) > _OF_NAMESPACE:
            self._drop(score.namespace)
        elif self._count > _CLASSES:
            self._drop(next(iter(self._classes)))
        return known

    def _drop(self, namespace: str) -> None:
        """Forget the least recently used class of a namespace."""
        of_namespace = self._classes[namespace]
        of_namespace.popitem(last=False)
        self._count -= 1
        if not of_namespace:
            del self._classes[namespace]

    def report(self) -> list[ClassReport]:
        """All classes, the most recently used last."""
        with self._lock:
            return [
                report_class(
                    namespace,
                    traffic,
                    known.learned,
                    self._floors.get(namespace) or Evidence(),
                    self._named(namespace, known),
                    self._terms.error,
                )
                for namespace, of_namespace in self._classes.items()
                for traffic, known in of_namespace.items()
            ]

    def _named(self, namespace: str, known: _Class) -> tuple[str, str, float]:
        if not self.steers:
            return "", "", 0.0
        made = self._decision(namespace, known)
        tried = self._ladder[made.tried] if made.tried != made.rung else ""
        return self._ladder[made.rung], tried, made.share

    # --- restarts ----------------------------------------------------------------------------

    def forget(self, namespace: str) -> None:
        """Nothing of a namespace is kept, neither here nor in the file."""
        with self._lock:
            gone = self._classes.pop(namespace, {})
            self._count -= len(gone)
            known = self._floors.pop(namespace, None) is not None or bool(gone)
        if known:
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
            return
        if kept is None or kept.ladder != self._meaning:
            return
        self._floors.update(kept.floors)
        for namespace, learned in kept.classes.items():
            classes = OrderedDict((name, _Class(one)) for name, one in learned.items())
            self._classes[namespace] = classes
            self._count += len(classes)

    def _write(self) -> None:
        if self._file is None:
            return
        with self._writing:
            with self._lock:
                self._changed, self._written = False, self._clock()
                encoded = self._file.encode(self._kept())
            try:
                self._file.write(encoded)
            except OSError as error:
                self._changed = True
                self._metrics.error(StorageError.kind)
                self._say.warn("quality", f"what was learned of quality was not written: {error}")

    def _kept(self) -> Kept:
        return Kept(
            self._meaning,
            {
                namespace: {name: known.learned for name, known in of_namespace.items()}
                for namespace, of_namespace in self._classes.items()
            },
            dict(self._floors),
        )
