"""What is known of the quality of each class, as numbers with limits."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvshare_store.quality.confidence import Interval, Tally
from kvshare_store.quality.evidence import MOST_NATS, Evidence, Learned


class PolicyReport(msgspec.Struct, frozen=True):
    """Answers that were served under one policy, or controls. Rates are shares of greedy answers,
    regrets nats for each token."""

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
    """The rate of divergence beyond that of controls."""
    extra_regret: Interval


class ClassReport(msgspec.Struct, frozen=True):
    """One class of traffic."""

    namespace: str
    traffic: str
    rung: str
    """The policy that its requests get; empty without a bound."""
    tried: str
    """The next one, which `share` of its requests get; empty if none."""
    share: float
    epoch: int
    """Counts how often its evidence began anew."""
    policies: tuple[PolicyReport, ...]
    floor: PolicyReport
    """Controls of the namespace."""


def report_class(
    namespace: str,
    traffic: str,
    learned: Learned,
    floor: Evidence,
    decision: tuple[str, str, float],
    error: float,
) -> ClassReport:
    """`decision`: rung, tried, share. `error`: the probability that an interval is ever wrong."""
    policies: Mapping[str, Evidence] = learned.policies
    return ClassReport(
        namespace,
        traffic,
        *decision,
        learned.epoch,
        tuple(_report(policy, policies[policy], floor, error) for policy in sorted(policies)),
        _report("", floor, None, error),
    )


def _report(policy: str, found: Evidence, floor: Evidence | None, error: float) -> PolicyReport:
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
    a, b = one.interval(error / 4), other.interval(error / 4)
    return Interval(a.mean - b.mean, a.low - b.high, a.high - b.low)


def _nats(share: Interval) -> Interval:
    return Interval(*(MOST_NATS * value for value in share))
