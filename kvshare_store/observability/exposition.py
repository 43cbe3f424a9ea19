"""What a daemon has counted, for Prometheus: `Store.stats()` in its text format.

Needs the extra `metrics`; nothing else imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from kvshare_store.errors import UnsupportedError
from kvshare_store.observability.metrics import BUCKETS

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise UnsupportedError(
        "metrics need a library: pip install 'kvshare-store[metrics]'"
    ) from error

CONTENT_TYPE = CONTENT_TYPE_LATEST

Stats = Mapping[str, Any]
Sample = tuple[tuple[str, ...], Any]
"""Values of the labels, and what was counted."""
Read = Callable[[Stats], Iterable[Sample]]


class Family(NamedTuple):
    """One metric. The name is the exported one: a counter's ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...]
    read: Read


def exposition(stats: Stats) -> bytes:
    """The statistics of a store (`Store.stats()`), or of a daemon (the answer to `Stats`), as
    Prometheus reads them; the content type is `CONTENT_TYPE`."""
    registry = CollectorRegistry()
    registry.register(StatsCollector(lambda: stats))
    return generate_latest(registry)


class StatsCollector(Collector):
    """Statistics, asked for at each scrape, beside what else a registry collects."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One family for each metric. What the statistics do not have is left out."""
        stats = self._stats()
        for family in FAMILIES:
            yield _filled(family, stats)


def _filled(family: Family, stats: Stats) -> Metric:
    about = (family.name, family.help)
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(*about, labels=family.labels)
        for labels, durations in family.read(stats):
            bounds = [*map(str, BUCKETS), "+Inf"]
            buckets = list(zip(bounds, durations["buckets"], strict=True))
            histogram.add_metric(labels, buckets, durations["sum"])
        return histogram
    made = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = made(*about, labels=family.labels)
    for labels, value in family.read(stats):
        metric.add_metric(labels, value)
    return metric


# --- where each value is in the statistics ------------------------------------------------------


def _one(*path: str) -> Read:
    """One value without labels, in dictionaries within each other."""

    def read(stats: Stats) -> Iterator[Sample]:
        found: Any = stats
        for name in path:
            if name not in found:
                return
            found = found[name]
        yield (), found

    return read


def _named(**fields: str) -> Read:
    """One value for each label: the label's value, and the counter that it stands for."""
    return lambda stats: [((label,), stats[name]) for label, name in fields.items()]


def _each(*path: str) -> Read:
    """One value for each entry of a dictionary, whose keys are the label."""
    find = _one(*path)
    return lambda stats: [
        ((name,), float(value)) for _, found in find(stats) for name, value in found.items()
    ]


def _tiers(name: str) -> Read:
    return lambda stats: [
        ((tier,), said[name]) for tier, said in stats["tiers"].items() if name in said
    ]


def _breakers(stats: Stats) -> Iterator[Sample]:
    for tier, said in stats["tiers"].items():
        for state in ("closed", "open", "half-open") if "breaker" in said else ():
            yield (tier, state), float(said["breaker"] == state)


def _moved(name: str) -> Read:
    return lambda stats: [((move["source"], move["target"]), move[name]) for move in stats["moved"]]


def _not_reused(stats: Stats) -> int:
    """The sum never falls: what was taken for computed is counted as the engine's own later."""
    return int(stats["tokens_recomputed"] + stats["tokens_engine_cached"])


def _tokens(stats: Stats) -> Iterator[Sample]:
    for kind in ("exact", "continued", "edited"):
        yield (kind,), stats[f"tokens_reused_{kind}"]
    yield ("not_reused",), _not_reused(stats)


def _spaces(name: str) -> Read:
    return lambda stats: [
        ((space, said["tenant"], said["model"]), said[name])
        for space, said in stats["namespaces"].items()
    ]


def _spaces_by(name: str, kinds: tuple[str, ...]) -> Read:
    return lambda stats: [
        ((space, said["tenant"], said["model"], kind), said[name].get(kind, 0))
        for space, said in stats["namespaces"].items()
        for kind in kinds
    ]


def _scores(name: str) -> Read:
    return lambda stats: [
        ((policy, chosen, edit), one[name])
        for edit, by_policy in stats.get("scores_by_edit", {}).items()
        for policy, sums in by_policy.items()
        for chosen, one in sums.items()
    ]


def _diverged(stats: Stats) -> Iterator[Sample]:
    for (policy, chosen, edit), count in _scores("diverged")(stats):
        if chosen == "greedy":
            yield (policy, edit), count


def _extra_rates(stats: Stats) -> Iterator[Sample]:
    for policy, limits in stats.get("quality", {}).get("extra", {}).items():
        for limit, rate in limits.items():
            yield (policy, limit), rate


def _failing(stats: Stats) -> list[Sample]:
    health = stats["health"]
    parts = {**health["threads"], **health["failures"], **health["reasons"]}
    return [((part,), float(part in health["reasons"])) for part in parts]


# --- every metric ---------------------------------------------------------------------------------

_SPACE = ("namespace", "tenant", "model")

_REQUESTS = (
    Family("kvshare_build_info", "gauge", "Always 1; the labels say which release runs, with which "
           "policy", ("version", "policy"), lambda s: [((s["version"], s["policy"]), 1)]),
    Family("kvshare_start_time_seconds", "gauge", "When the store was opened, Unix seconds; "
           "counters start there", (), _one("since")),
    Family("kvshare_lookups_total", "counter", "Requests that asked for a plan, and those that the "
           "engine declined without asking", (), _one("lookups")),
    Family("kvshare_requests_total", "counter", "Requests that have ended, by the least exact kind "
           "of reuse that they had: `exact`, `continued`, `edited`, or `miss`", ("outcome",),
           _named(exact="hits_exact", continued="hits_continued", edited="hits_edited",
                  miss="misses")),
    Family("kvshare_declined_total", "counter", "Requests that ended without reuse, by reason",
           ("reason",), _each("declined")),
    Family("kvshare_requested_tokens_total", "counter", "Prompt tokens of all lookups", (),
           _one("tokens_requested")),
    Family("kvshare_tokens_total", "counter", "Prompt tokens of requests that have ended: reused "
           "as `exact`, `continued` or `edited`; `not_reused`: computed, or found in the engine's "
           "own prefix cache", ("kind",), _tokens),
    Family("kvshare_engine_cached_tokens_total", "counter", "The part of `not_reused` that the "
           "engine's own prefix cache had; the engine computed the rest", (),
           _one("tokens_engine_cached")),
    Family("kvshare_loaded_bytes_total", "counter", "Bytes of rows that engines have loaded", (),
           _one("bytes_loaded")),
    Family("kvshare_lookup_seconds", "histogram", "Time from the question to the plan", (),
           _one("seconds", "lookup")),
    Family("kvshare_load_seconds", "histogram", "Time to load the rows of a plan into the engine",
           (), _one("seconds", "load")),
)  # fmt: skip
_SAVES = (
    Family("kvshare_save_seconds", "histogram", "Time to copy and name the rows of a prompt", (),
           _one("seconds", "save")),
    Family("kvshare_stored_bytes_total", "counter", "Bytes of rows that were saved", (),
           _one("bytes_stored")),
    Family("kvshare_stored_answers_total", "counter", "Answers that were saved", (),
           _one("answers_stored")),
    Family("kvshare_stored_answer_tokens_total", "counter", "Tokens of these answers", (),
           _one("tokens_answers_stored")),
    Family("kvshare_stored_edited_prompts_total", "counter", "Prompts that were saved with edited "
           "rows", (), _one("edited_stored")),
    Family("kvshare_settled_prompts_total", "counter", "Those whose exact rows were saved later",
           (), _one("settled")),
    Family("kvshare_second_looks_total", "counter", "Edited prompts given to idle engines, to be "
           "computed in full", (), _one("looks")),
    Family("kvshare_second_looks_dropped_total", "counter", "Those that a request ended early", (),
           _one("looks_dropped")),
    Family("kvshare_second_looks_declined_total", "counter", "Edited prompts that no engine "
           "computes in full", (), _one("looks_declined")),
    Family("kvshare_second_look_controls_total", "counter", "Answers served in full that were "
           "given to idle engines, only to be scored", (), _one("looks_control")),
    Family("kvshare_second_looks_waiting", "gauge", "Edited prompts that wait for an idle engine",
           (), _one("looks_waiting")),
    Family("kvshare_text_vectors_waiting", "gauge", "Prompts that wait for a text vector, which is "
           "made while the machine is idle", (), _one("texts_waiting")),
    Family("kvshare_staged_saves", "gauge", "Saves that have begun and not ended", (),
           _one("staged")),
)  # fmt: skip
_QUALITY = (
    Family("kvshare_scored_answers_total", "counter", "Answers that second looks have scored, by "
           "the policy that they were served under (`control`: in full), how their tokens were "
           "chosen (`greedy` or `sampled`), and the kind of edit of their class",
           ("policy", "chosen", "edit"), _scores("answers")),
    Family("kvshare_scored_tokens_total", "counter", "Their tokens that were scored",
           ("policy", "chosen", "edit"), _scores("tokens")),
    Family("kvshare_regret_nats_total", "counter", "Sum of log p(best token) - log p(served token) "
           "over these tokens, in full compute", ("policy", "chosen", "edit"), _scores("regret")),
    Family("kvshare_diverged_answers_total", "counter", "Greedy answers whose first tokens are not "
           "those of full compute", ("policy", "edit"), _diverged),
    Family("kvshare_quality_bound", "gauge", "The configured `quality_bound`: the rate of extra "
           "divergence that is accepted; 0: any, and nothing is steered", (),
           _one("quality", "bound")),
    Family("kvshare_quality_confidence", "gauge", "The configured `quality_confidence`", (),
           _one("quality", "confidence")),
    Family("kvshare_quality_classes", "gauge", "Classes of traffic, by the policy that their "
           "requests get", ("policy",), _each("quality", "classes")),
    Family("kvshare_quality_silent_classes", "gauge", "Classes of which the last 1,000 requests on "
           "approximate rows had no score, so that what was learned counts no more", (),
           _one("quality", "silent")),
    Family("kvshare_quality_doubted_classes", "gauge", "Classes with a policy whose last scores "
           "look as if its rate had risen above the bound, so that it counts as unknown", (),
           _one("quality", "doubted")),
    Family("kvshare_quality_worst_extra_rate", "gauge", "Limits (`lower`, `upper`) of the rate of "
           "divergence beyond that of controls, each of the class where it is highest",
           ("policy", "limit"), _extra_rates),
    Family("kvshare_quality_tightened_total", "counter", "How often a score made a class stricter",
           (), _one("quality_tightened")),
)  # fmt: skip
_THERE = (
    Family("kvshare_nodes", "gauge", "Prompts in the store", (), _one("nodes")),
    Family("kvshare_blocks", "gauge", "Blocks that they use", (), _one("blocks")),
    Family("kvshare_leases", "gauge", "Plans whose blocks are held in shared memory", (),
           _one("leases")),
    Family("kvshare_reserved_slots", "gauge", "Slots of shared memory that are being filled", (),
           _one("reserved")),
    Family("kvshare_catalog_bytes", "gauge", "Bytes of the catalogue on disk", (),
           _one("catalog_bytes")),
)  # fmt: skip
_TIERS = (
    Family("kvshare_tier_bytes", "gauge", "Bytes that a tier holds", ("tier",), _tiers("bytes")),
    Family("kvshare_tier_budget_bytes", "gauge", "Bytes that it may hold; 0: the store sets no "
           "limit", ("tier",), _tiers("budget")),
    Family("kvshare_tier_blocks", "gauge", "Blocks in a tier", ("tier",), _tiers("blocks")),
    Family("kvshare_moved_blocks_total", "counter", "Blocks copied from one tier to another; the "
           "source of rows that were saved, merged or imported is `new`", ("source", "target"),
           _moved("blocks")),
    Family("kvshare_moved_bytes_total", "counter", "Bytes of rows in these blocks",
           ("source", "target"), _moved("bytes")),
    Family("kvshare_evicted_blocks_total", "counter", "Blocks that left a tier to make room",
           ("tier",), _each("evicted")),
    Family("kvshare_quarantined_blocks_total", "counter", "Blocks that were read and are not what "
           "their names say", ("tier",), _tiers("quarantined")),
    Family("kvshare_tier_retries_total", "counter", "Second and later attempts of a call",
           ("tier",), _tiers("retries")),
    Family("kvshare_tier_hedged_reads_total", "counter", "Second reads because the first took long",
           ("tier",), _tiers("hedges")),
    Family("kvshare_tier_refused_calls_total", "counter", "Calls that the breaker refused",
           ("tier",), _tiers("refused")),
    Family("kvshare_tier_breaker_state", "gauge", "1 for the state of the breaker: `closed`, "
           "`open` (the tier is not asked) or `half-open` (one call tries)", ("tier", "state"),
           _breakers),
)  # fmt: skip
_HEALTH = (
    Family("kvshare_healthy", "gauge", "0 while a part fails, else 1", (),
           lambda s: [((), float(s["health"]["state"] == "ok"))]),
    Family("kvshare_part_failing", "gauge", "1 if the last thing that a part did failed",
           ("part",), _failing),
    Family("kvshare_part_failures_total", "counter", "Unexpected failures of a part", ("part",),
           _each("health", "failures")),
    Family("kvshare_part_last_success_timestamp_seconds", "gauge", "When a part last did its work, "
           "Unix seconds", ("part",), _each("health", "well")),
    Family("kvshare_thread_alive", "gauge", "1 while a thread runs", ("part",),
           _each("health", "threads")),
    Family("kvshare_errors_total", "counter", "Errors by kind, expected ones too", ("kind",),
           _each("errors")),
    Family("kvshare_commit_queue_length", "gauge", "Pieces of work that wait for the committer",
           (), _one("queue", "waiting")),
    Family("kvshare_commit_busy_seconds", "gauge", "How long the committer has been at its present "
           "work; 0 while it waits for some", (), _one("queue", "seconds")),
    Family("kvshare_commit_refused_total", "counter", "Prompts that storage has refused", (),
           _one("queue", "refused")),
)  # fmt: skip
_DAEMON = (
    Family("kvshare_connections", "gauge", "Clients that are connected", (),
           _one("daemon", "connections")),
    Family("kvshare_requests_in_progress", "gauge", "Messages that are being answered", (),
           _one("daemon", "requests")),
    Family("kvshare_waiting_requests", "gauge", "Messages that wait for a thread of their lane",
           ("lane",), _each("daemon", "waiting")),
    Family("kvshare_draining", "gauge", "1 while the daemon ends: engines plan nothing more", (),
           _one("daemon", "draining")),
    Family("kvshare_cut_off_total", "counter", "Clients that were cut off because they broke a "
           "limit", (), _one("daemon", "cut_off")),
)  # fmt: skip
_NAMESPACES = (
    Family("kvshare_namespace_requests_total", "counter", "As `kvshare_requests_total`, of one "
           "namespace", (*_SPACE, "outcome"),
           _spaces_by("requests", ("exact", "continued", "edited", "miss"))),
    Family("kvshare_namespace_tokens_total", "counter", "As `kvshare_tokens_total`, of one "
           "namespace", (*_SPACE, "kind"),
           _spaces_by("tokens", ("exact", "continued", "edited", "not_reused"))),
    Family("kvshare_namespace_nodes", "gauge", "Prompts of a namespace; one that became exact "
           "counts twice until its edited form has left", _SPACE, _spaces("nodes")),
    Family("kvshare_namespace_bytes", "gauge", "Bytes of rows of a namespace, before any codec",
           _SPACE, _spaces("bytes")),
)  # fmt: skip
GROUPS: dict[str, tuple[Family, ...]] = {
    "requests": _REQUESTS,
    "saves": _SAVES,
    "known quality": _QUALITY,
    "what is there": _THERE,
    "tiers": _TIERS,
    "health": _HEALTH,
    "the daemon": _DAEMON,
    "namespaces and tenants": _NAMESPACES,
}
"""As docs/metrics.md shows them."""
FAMILIES = tuple(family for group in GROUPS.values() for family in group)
