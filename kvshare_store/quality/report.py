"""What is known of the quality of each class, as numbers with limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from kvshare_store.config import policy_names
from kvshare_store.quality.classes import Known
from kvshare_store.quality.confidence import Interval, Tally
from kvshare_store.quality.evidence import MOST_NATS, Evidence, Learned, Scores
from kvshare_store.quality.ladder import Terms, extra_of, seen
from kvshare_store.quality.parts import COMPUTED, DISTANCE, Bucket
from kvshare_store.quality.trend import Moment


class ScoresReport(msgspec.Struct, frozen=True, kw_only=True):
    """Answers that were scored. Rates are shares of greedy answers, regrets nats for each token;
    each has a mean, a lower and an upper limit."""

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
    """The rate of divergence beyond that of controls."""
    extra_regret: Interval


class PartReport(ScoresReport, frozen=True, kw_only=True):
    """Those of a policy that are alike in one respect: from `start` to below `stop`."""

    start: int
    stop: int | None
    """None: no limit."""


class PolicyReport(ScoresReport, frozen=True, kw_only=True):
    """Answers that were served under one policy, or controls. The limits of `extra` are those that
    the ladder goes by."""

    policy: str
    """Empty for controls."""
    computed: tuple[PartReport, ...] = ()
    """Apart by the percentage of the prompt's tokens behind its exact prefix that were computed."""
    distance: tuple[PartReport, ...] = ()
    """Apart by the tokens from the end of the nearest edit to the answer."""
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

    def meant(self, classes: Iterable[tuple[str, str, Known]]) -> list[tuple[str, str, Known]]:
        """All that are meant."""
        return [
            one for one in classes
            if one[0].startswith(self.namespace) and self.traffic in ("", one[1])
        ]  # fmt: skip

    @property
    def part(self) -> slice:
        """Of all that are meant, those that are reported."""
        return slice(self.start, None if self.most is None else self.start + self.most)


def most_scored_first(classes: list[tuple[str, str, Known]]) -> list[tuple[str, str, Known]]:
    """The order of a report."""
    return sorted(classes, key=lambda one: (-_scored(one[2].learned), one[1]))


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
        tuple(_of_policy(learned, name, floor, terms, trend(name)) for name in names),
        report_floor(floor, terms),
    )


def _of_policy(
    learned: Learned, policy: str, floor: Evidence, terms: Terms, trend: tuple[Moment, ...]
) -> PolicyReport:
    found, error = learned.policies[policy], terms.error
    known = _scores(found, floor, error) | {"extra": extra_rate(learned, policy, floor, terms)}
    return PolicyReport(
        policy=policy,
        computed=_parts(COMPUTED, found.computed, floor, error),
        distance=_parts(DISTANCE, found.distance, floor, error),
        trend=trend,
        **known,
    )


def _parts(
    buckets: Sequence[Bucket], found: Mapping[str, Scores], floor: Evidence, error: float
) -> tuple[PartReport, ...]:
    return tuple(
        PartReport(start=one.start, stop=one.stop, **_scores(found[one.name], floor, error))
        for one in buckets
        if one.name in found
    )


def report_floor(floor: Evidence, terms: Terms) -> PolicyReport:
    """Of controls."""
    return PolicyReport(policy="", **_scores(floor, Evidence(), terms.error))


def extra_rate(learned: Learned, policy: str, floor: Evidence, terms: Terms) -> Interval:
    """The rate of divergence beyond the floor, with the limits that the ladder goes by."""
    found = extra_of([seen(learned, floor, terms)], [policy], terms)
    mean = learned.of(policy).diverged.mean - floor.diverged.mean
    return Interval(mean, found.lower.item(), found.upper.item())


def _scores(found: Scores, base: Scores, error: float) -> dict[str, Any]:
    """The fields of a `ScoresReport`. `base`: of controls. Each interval is ever wrong with the
    probability `error` at most."""
    return {
        "greedy": found.diverged.count,
        "sampled": found.sampled.count,
        "diverged": found.diverged.interval(error / 2),
        "regret": _nats(found.regret.interval(error / 2)),
        "sampled_regret": _nats(found.sampled.interval(error / 2)),
        "extra": _beyond(found.diverged, base.diverged, error),
        "extra_regret": _nats(_beyond(found.regret, base.regret, error)),
    }


def _beyond(one: Tally, other: Tally, error: float) -> Interval:
    """The difference of two means; four limits share the error."""
    ours, theirs = one.interval(error / 4), other.interval(error / 4)
    return Interval(ours.mean - theirs.mean, ours.low - theirs.high, ours.high - theirs.low)


def _nats(share: Interval) -> Interval:
    return Interval(*(MOST_NATS * value for value in share))
