"""What is known of the quality of each class, as numbers with limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from kvshare_store.config import policy_names
from kvshare_store.quality.classes import Known
from kvshare_store.quality.confidence import Interval, Tally, limits
from kvshare_store.quality.evidence import MOST_NATS, Evidence, Learned, Scores
from kvshare_store.quality.ladder import Terms, extra_of, requests_needed, scores_needed, seen
from kvshare_store.quality.parts import COMPUTED, DISTANCE
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
    needed: int = 0
    """About so many greedy scores under `tried`, and its requests get that; 0 without a bound."""
    requests: int = 0
    """So many more requests that takes, or more; 0 where the rung is not `exact`."""


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
    return sorted(classes, key=lambda one: (-scored(one[2].learned), one[1]))


ALL = Wanted()


class Counts(NamedTuple):
    """Of a report."""

    classes: int
    scored: int
    """Of these with scored answers."""
    floors: int
    """Namespaces with controls."""


def scored(learned: Learned) -> int:
    """How many answers of a class were scored."""
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
        scores_needed(terms, learned.epoch),
        _requests(learned, decision, terms),
    )


def _requests(learned: Learned, decision: tuple[str, str, float], terms: Terms) -> int:
    rung, tried, _ = decision
    if rung != "exact" or not tried:
        return 0
    scored = learned.policies.get(tried)
    return requests_needed(terms, scored.diverged.count if scored else 0, learned.epoch)


def _of_policy(
    learned: Learned, policy: str, floor: Evidence, terms: Terms, trend: tuple[Moment, ...]
) -> PolicyReport:
    found = learned.policies[policy]
    computed = [one for one in COMPUTED if one.name in found.computed]
    distance = [one for one in DISTANCE if one.name in found.distance]
    parts = (
        *(found.computed[one.name] for one in computed),
        *(found.distance[one.name] for one in distance),
    )
    whole, *known = _known([found, *parts], floor, terms.error)
    reports = [
        PartReport(start=one.start, stop=one.stop, **fields)
        for one, fields in zip((*computed, *distance), known, strict=True)
    ]
    return PolicyReport(
        policy=policy,
        computed=tuple(reports[: len(computed)]),
        distance=tuple(reports[len(computed) :]),
        trend=trend,
        **whole | {"extra": extra_rate(learned, policy, floor, terms)},
    )


def report_floor(floor: Evidence, terms: Terms) -> PolicyReport:
    """Of controls."""
    (known,) = _known([floor], Evidence(), terms.error)
    return PolicyReport(policy="", **known)


def extra_rate(learned: Learned, policy: str, floor: Evidence, terms: Terms) -> Interval:
    """The rate of divergence beyond the floor, with the limits that the ladder goes by."""
    found = extra_of([seen(learned, floor, terms)], [policy], terms)
    mean = learned.of(policy).diverged.mean - floor.diverged.mean
    return Interval(mean, found.lower.item(), found.upper.item())


def _known(found: Sequence[Scores], base: Scores, error: float) -> list[dict[str, Any]]:
    """The fields of a `ScoresReport` of each. `base`: of controls. Each interval is ever wrong with
    the probability `error` at most: two limits share that, or four of a difference."""
    tallies = [(one.diverged, one.regret, one.sampled) for one in found]
    alone = _intervals(tallies, error / 2)
    apart = _intervals(tallies, error / 4)
    ((diverged, regret, _),) = _intervals([(base.diverged, base.regret, base.sampled)], error / 4)
    return [
        {
            "greedy": one.diverged.count,
            "sampled": one.sampled.count,
            "diverged": itself[0],
            "regret": _nats(itself[1]),
            "sampled_regret": _nats(itself[2]),
            "extra": _beyond(other[0], diverged),
            "extra_regret": _nats(_beyond(other[1], regret)),
        }
        for one, itself, other in zip(found, alone, apart, strict=True)
    ]


def _intervals(tallies: Sequence[Sequence[Tally]], error: float) -> list[list[Interval]]:
    """Those of many at once."""
    low, high = limits([[one.numbers for one in row] for row in tallies], error)
    means = ([one.mean for one in row] for row in tallies)
    return [
        [Interval(*of) for of in zip(*row, strict=True)]
        for row in zip(means, low.tolist(), high.tolist(), strict=True)
    ]


def _beyond(one: Interval, other: Interval) -> Interval:
    """The difference of two means."""
    return Interval(one.mean - other.mean, one.low - other.high, one.high - other.low)


def _nats(share: Interval) -> Interval:
    return Interval(*(MOST_NATS * value for value in share))
