"""What is known of the quality of each class, as numbers with limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from kvshare_store.config import policy_names
from kvshare_store.quality.classes import Known
from kvshare_store.quality.confidence import Interval, Tally
from kvshare_store.quality.evidence import MOST_NATS, Evidence, Learned
from kvshare_store.quality.ladder import Terms
from kvshare_store.quality.trend import Moment


class PolicyReport(msgspec.Struct, frozen=True):
    """Answers that were served under one policy, or controls. Rates are shares of greedy answers,
    regrets nats for each token; each has a mean, a lower and an upper limit."""

    policy: str
    """Empty for controls."""
    greedy: int
    """Greedy answers that were scored."""
    sampled: int
    """The other answers that were scored."""
    diverged: Interval
    """The rate of divergence within the first tokens."""
    regret: Interval
    """The mean regret of greedy answers."""
    sampled_regret: Interval
    extra: Interval
    """The rate of divergence beyond that of controls, with the limits that the ladder goes by."""
    extra_regret: Interval
    trend: tuple[Moment, ...] = ()
    """What was known in the last day, the oldest first, if that was asked for."""


class ClassReport(msgspec.Struct, frozen=True):
    """One class of traffic."""

    namespace: str
    """Its digest."""
    traffic: str
    """The name of the class."""
    rung: str
    """The policy that its requests get; empty without a bound."""
    tried: str
    """The next one, which `share` of its requests get; empty if none."""
    share: float
    epoch: int
    """Counts how often its evidence began anew."""
    unscored: int
    """Requests on approximate rows since the last score of a greedy answer."""
    scored: float
    """When the last score came, Unix seconds; 0: never."""
    policies: tuple[PolicyReport, ...]
    """From the strictest to the laxest."""
    floor: PolicyReport
    """Controls of the namespace."""


class Wanted(NamedTuple):
    """Which classes are reported."""

    namespace: str = ""
    """The beginning of a digest."""
    traffic: str = ""
    """Only this one."""
    start: int = 0
    """Without so many of the first ones."""
    most: int | None = None
    trends: bool = False
    """With what was known in the last day."""

    def of(self, classes: Iterable[tuple[str, str, Known]]) -> list[tuple[str, str, Known]]:
        """All that are meant, those with the most scored answers first."""
        found = [
            one for one in classes
            if one[0].startswith(self.namespace) and self.traffic in ("", one[1])
        ]  # fmt: skip
        return sorted(found, key=lambda one: (-_scored(one[2].learned), one[1]))

    @property
    def part(self) -> slice:
        """Of all that are meant, those that are reported."""
        return slice(self.start, None if self.most is None else self.start + self.most)


ALL = Wanted()


def _scored(learned: Learned) -> int:
    policies = list(learned.policies.values())  # at once: nobody holds the lock
    return sum(one.diverged.count + one.sampled.count for one in policies)


def report_class(
    namespace: str,
    traffic: str,
    learned: Learned,
    floor: Evidence,
    decision: tuple[str, str, float],
    terms: Terms,
    trend: Callable[[str], tuple[Moment, ...]] = lambda _: (),
) -> ClassReport:
    """`decision`: rung, tried, share. `trend`: that of a policy."""
    names = sorted(learned.policies, key=policy_names().index)
    return ClassReport(
        namespace,
        traffic,
        *decision,
        learned.epoch,
        learned.unscored,
        learned.scored,
        tuple(
            msgspec.structs.replace(
                _report(name, learned.policies[name], floor, terms.error),
                extra=extra_rate(learned, name, floor, terms),
                trend=trend(name),
            )
            for name in names
        ),
        report_floor(floor, terms),
    )


def report_floor(floor: Evidence, terms: Terms) -> PolicyReport:
    """Of controls."""
    return _report("", floor, None, terms.error)


def extra_rate(learned: Learned, policy: str, floor: Evidence, terms: Terms) -> Interval:
    """The rate of divergence beyond the floor, with the limits that the ladder goes by."""
    return _apart(
        learned.of(policy).diverged.interval(terms.each(learned.epoch)),
        floor.diverged.interval(terms.each()),
    )


def _report(policy: str, found: Evidence, floor: Evidence | None, error: float) -> PolicyReport:
    """Each interval is ever wrong with the probability `error` at most."""
    base = floor or Evidence()
    return PolicyReport(
        policy,
        found.diverged.count,
        found.sampled.count,
        found.diverged.interval(error / 2),
        _nats(found.regret.interval(error / 2)),
        _nats(found.sampled.interval(error / 2)),
        _beyond(found.diverged, base.diverged, error),
        _nats(_beyond(found.regret, base.regret, error)),
    )


def _beyond(one: Tally, other: Tally, error: float) -> Interval:
    """The difference of two means; four limits share the error."""
    return _apart(one.interval(error / 4), other.interval(error / 4))


def _apart(one: Interval, other: Interval) -> Interval:
    return Interval(one.mean - other.mean, one.low - other.high, one.high - other.low)


def _nats(share: Interval) -> Interval:
    return Interval(*(MOST_NATS * value for value in share))
