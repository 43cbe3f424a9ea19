"""A logged request that is planned again: whether it would be served as it was."""

from __future__ import annotations

from typing import Literal

import msgspec

from kvshare_store.lookup.explanation import Explanation
from kvshare_store.lookup.request_log import MOST_RUNS, Logged, runs_by_kind
from kvshare_store.lookup.steering import reason_under_bound

Differs = Literal["", "policy", "donors", "plan", "outcome"]
"""`policy`: another one was asked for. `donors`: the store holds other prompts. `plan`: anything
else makes it another plan. `outcome`: the same plan, whose rows were not used then. Empty: it would
be served as it was."""

_NOTHING_STORED = ("empty_store", "no_donor")


def under_its_bound(logged: Logged, found: Explanation) -> Explanation:
    """The explanation under the policy that a request got: what a bound had taken away is called by
    its name."""
    if logged.steering is None:
        return found
    return msgspec.structs.replace(found, declined=reason_under_bound(found.declined))


def differs(logged: Logged, found: Explanation) -> Differs:
    """What makes this plan another one than what was served."""
    if found.policy != logged.policy:
        return "policy"
    reused = [part for part in found.parts if part.donor]
    if {part.donor for part in reused} != set(logged.donors):
        of_store = logged.donors or logged.reason in _NOTHING_STORED
        return "donors" if of_store else "plan"
    if runs_by_kind(reused)[:MOST_RUNS] != logged.spans:
        return "plan"
    if logged.reason == found.declined:
        return ""
    return "outcome" if logged.donors else "plan"
