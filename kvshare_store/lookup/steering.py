"""Steering: where the operator has set a bound, what is known of a request's class chooses its
policy, never a laxer one than the configured one or the one that the request asked for."""

from __future__ import annotations

import blake3
import msgspec

from kvshare_store.config import PolicyName, StoreConfig
from kvshare_store.keys import Keyring
from kvshare_store.lookup.cover import Cover
from kvshare_store.lookup.policy import ReusePolicy, as_strict, configured_policy, stricter_policy
from kvshare_store.nodes.edits import edit_script
from kvshare_store.nodes.grams import GRAM
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.state import NodeState
from kvshare_store.observability.metrics import Metrics
from kvshare_store.quality.keeping import NAME, File
from kvshare_store.quality.ladder import Terms, scores_needed
from kvshare_store.quality.quality import Quality
from kvshare_store.quality.traffic import traffic_of
from kvshare_store.readable import percent

QUALITY_BOUND = "quality_bound"
_OF_THE_POLICY = ("no_donor", "nothing_kept", "no_saving")
"""Reasons to decline that depend on what the policy reuses."""


def open_quality(config: StoreConfig, metrics: Metrics, keys: Keyring | None) -> Quality:
    """What the home has learned, for the ladder of the configured policy."""
    policy = configured_policy(config)
    ladder = ladder_of(policy.name)
    key = keys.of_table(NAME) if keys is not None else None
    file = File(config.home_path / NAME, key) if config.disk or config.remote else None
    meaning = repr([stricter_policy(policy, rung) for rung in ladder])
    return Quality(
        ladder, terms_of(config), metrics, file, meaning=blake3.blake3(meaning.encode()).hexdigest()
    )


def terms_of(config: StoreConfig) -> Terms:
    """What the operator accepts."""
    return Terms(config.quality_bound, 1.0 - config.quality_confidence)


def bound_text(config: StoreConfig) -> str:
    """What a bound does to reuse at first, for the log; empty where nothing is steered."""
    terms = terms_of(config)
    if not terms.bound or len(ladder_of(config.policy)) < 2:
        return ""
    return (
        f"quality_bound is {percent(terms.bound)}: every new class of traffic begins at exact. "
        "Reuse of edited rows returns as answers are scored (second_look), class by class after "
        f"about {scores_needed(terms):,} good scores: see kvshare quality"
    )


def ladder_of(policy: PolicyName) -> tuple[str, ...]:
    """The policies from `exact` to this one; none below `exact`."""
    return as_strict(policy)[1:]


class Steering(msgspec.Struct, frozen=True):
    """What a bound makes of a prompt's class."""

    bound: float
    """The extra rate of divergence that the operator accepts."""
    traffic: str
    """The class."""
    rung: str
    """The policy that its requests get,"""
    tried: str
    """but for those that get the next one, if any does,"""
    share: float
    """which are so many."""


def rung_of(
    quality: Quality,
    state: NodeState,
    cover: Cover,
    donor: Node,
    policy: ReusePolicy,
    namespace: str,
) -> tuple[ReusePolicy, Steering | None]:
    """The policy for a request of `namespace` that has an edited plan under `policy`, made of
    `cover`, whose first donor is `donor`; and what made it stricter, if it is. It counts as served.
    What is learned is the request's namespace's, also where the donor is of a pool."""
    traffic = _traffic(state, cover, donor)
    quality.planned.planned(namespace, cover.request, traffic, donor.id)
    chosen = stricter_policy(policy, quality.rung(namespace, traffic, policy.name))
    if chosen is policy:
        return policy, None
    return chosen, _steering(quality, traffic, policy.name, namespace)


def steering_of(
    quality: Quality, state: NodeState, cover: Cover, donor: Node, policy: str, namespace: str
) -> Steering | None:
    """As `rung_of`, for whoever only asks: nothing counts as served. None without a bound."""
    return _steering(quality, _traffic(state, cover, donor), policy, namespace)


def _steering(quality: Quality, traffic: str, policy: str, namespace: str) -> Steering | None:
    found = quality.would(namespace, traffic, policy)
    return None if found is None else Steering(quality.bound, traffic, *found)


def reason_under_bound(declined: str) -> str:
    """Why a plan is declined under a rung, where the policy that it would have had without the
    bound reuses rows: the bound, or what has nothing to do with policies."""
    return QUALITY_BOUND if declined in _OF_THE_POLICY else declined


def _traffic(state: NodeState, cover: Cover, donor: Node) -> str:
    edits = edit_script(cover.matches(donor, GRAM), donor.length, cover.request)
    with state.lock:
        return traffic_of(state.tree, donor, edits, len(cover.request))
