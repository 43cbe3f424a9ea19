"""What the daemon tells people about the quality of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from kvshare_store.daemon import protocol
from kvshare_store.maintenance.purge import matching
from kvshare_store.quality.ladder import STALE
from kvshare_store.quality.report import ClassReport, PolicyReport, Wanted
from kvshare_store.save.verdicts import Recent
from kvshare_store.store import Store

_WORST = 20
_FLOORS = 50


class Space(msgspec.Struct, frozen=True):
    """Whose it is. Empty names: of the namespace nothing is stored any more."""

    digest: str
    model: str = ""
    tenant: str = ""
    pool: str = ""
    lora: str = ""


class ListedClass(msgspec.Struct, frozen=True):
    """A class of traffic, and what is known of it."""

    space: Space
    family: str
    """Names the prompts whose trees begin alike."""
    kind: str
    """What was edited: `append`, `insert`, `delete`, `replace` or `several`."""
    silent: bool
    """So many requests came without a score that what was learned counts no more."""
    example: str
    """A prompt of it that was scored lately; empty if none of those is stored any more."""
    donor: str
    """The prompt that the last request of it was planned from; empty if that is not stored any
    more, or nobody remembers: without a bound, and before its first request since the start."""
    known: ClassReport


class Floor(msgspec.Struct, frozen=True):
    """What the controls of a namespace show."""

    space: Space
    known: PolicyReport


class WorstAnswer(msgspec.Struct, frozen=True):
    """A recent answer on approximate rows. Regrets are nats for each token."""

    at: float
    """When it was scored, Unix seconds."""
    space: Space
    traffic: str
    policy: str
    regret: float
    """The mean."""
    worst: float
    diverged: int | None
    """The first token that is not the model's best, of a greedy request."""
    greedy: bool
    node: str
    """The prompt with its answer; empty if it is not stored any more."""
    request: str
    """The engine's name of the request, if it is still in the log."""


class QualityReport(msgspec.Struct, frozen=True):
    """What scored answers say."""

    policy: str
    """The configured one: the laxest that any request gets."""
    bound: float
    """The extra rate of divergence that the operator accepts; 0: nothing is steered."""
    confidence: float
    classes: tuple[ListedClass, ...]
    total: int
    """All classes that are meant: under a bound also those without scores."""
    floors: tuple[Floor, ...]
    floors_total: int
    worst: tuple[WorstAnswer, ...]
    """The one with the highest regret first, greedy ones before others."""
    scored: int = 0
    """Classes of `total` with scored answers."""


def quality(store: Store, message: protocol.Quality) -> QualityReport:
    """The answer to one question; `NamespaceError` if no one namespace begins so."""
    digest = message.namespace
    if digest and not store.quality.knows(digest):  # of one that is named in full, scores may stay
        digest = matching(store.nodes, digest)[0].digest
    wanted = Wanted(digest, message.traffic, message.start, message.limit, message.trends)
    floors = store.quality.floors(Wanted(digest, most=_FLOORS))
    counts = store.quality.counts(wanted)
    config, examples = store.config, store.verdicts.examples()
    return QualityReport(
        config.policy,
        config.quality_bound,
        config.quality_confidence,
        tuple(_listed(store, one, examples) for one in store.quality.report(wanted)),
        counts.classes,
        tuple(Floor(_space(store, name), known) for name, known in floors),
        counts.floors,
        _worst(store, store.verdicts.worst(_WORST, digest, message.traffic)),
        counts.scored,
    )


def _listed(
    store: Store, known: ClassReport, examples: Mapping[tuple[str, str], Sequence[str]]
) -> ListedClass:
    family, _, kind = known.traffic.partition("/")[2].partition("/")
    example = _stored(store, examples.get((known.namespace, known.traffic), ()))
    donor = _stored(store, [store.quality.planned.donor(known.namespace, known.traffic)])
    silent = known.unscored >= STALE
    space = _space(store, known.namespace)
    return ListedClass(space, family, kind, silent, example, donor, known)


def _space(store: Store, digest: str) -> Space:
    found = store.namespace(digest)
    if found is None:
        return Space(digest)
    return Space(digest, found.model, found.tenant, found.pool or "", found.lora)


def _worst(store: Store, recent: Sequence[Recent]) -> tuple[WorstAnswer, ...]:
    logged = {entry.request for entry in store.requests.last(None)}
    return tuple(
        WorstAnswer(
            at,
            _space(store, score.namespace),
            score.traffic,
            score.policy,
            score.regret,
            max(score.regrets, default=0.0),
            score.diverged,
            score.greedy,
            _stored(store, nodes),
            request if request in logged else "",
        )
        for nodes, (score, at, request) in recent
    )


def _stored(store: Store, nodes: Sequence[str]) -> str:
    """The one that is here, if both are the edited one: its parent shows what was edited."""
    with store.nodes.lock:
        found = [node for name in nodes if (node := store.tree.get(name)) is not None]
    return min(found, key=lambda node: node.exact).id if found else ""
