"""What this engine has reused, on vLLM's own `/metrics`.

The scheduler side counts requests once they have ended, with the numbers of their answers; the
worker side times loads. vLLM adds up what workers and scheduler report each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import prometheus_client
from kvshare_connectors.vllm.settings import PREFIX
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvshare_store.observability.metrics import BUCKETS
from kvshare_store.plan.spans import Reused
from kvshare_store.quality.score import diverged_at

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvshare_store.save.second_looks import Look

KINDS = ("exact", "continued", "edited", "recomputed")
OUTCOMES = ("exact", "continued", "edited", "miss", "aborted")
TOKENS, REQUESTS = "vllm:kvshare_tokens", "vllm:kvshare_requests"
LOOKUP, LOAD = "vllm:kvshare_lookup_seconds", "vllm:kvshare_load_seconds"
SCORED, SCORED_TOKENS = "vllm:kvshare_scored_answers", "vllm:kvshare_scored_tokens"
REGRET, DIVERGED = "vllm:kvshare_regret_nats", "vllm:kvshare_diverged_answers"
BOUND = "vllm:kvshare_quality_bound"


class Declared(NamedTuple):
    """One metric. Of a counter the exported name ends in `_total`; the labels come behind vLLM's
    own."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


_SCORE = ("policy", "chosen", "edit")
DECLARED = (
    Declared(TOKENS, "counter", "Tokens of prompts, by what became of them; with vLLM's own prefix "
             "hits all of them.", ("kind",)),
    Declared(REQUESTS, "counter", "Requests that have ended, by the least exact kind of reuse, and "
             "why without reuse.", ("outcome", "reason")),
    Declared(SCORED, "counter", "Answers that this engine has scored in second looks, by how they "
             "were served.", _SCORE),
    Declared(SCORED_TOKENS, "counter", "Their tokens that were scored.", _SCORE),
    Declared(REGRET, "counter", "Sum of log p(best token) - log p(served token) over these tokens, "
             "in full compute.", _SCORE),
    Declared(DIVERGED, "counter", "Greedy ones of these answers whose first tokens are not those "
             "of full compute.", ("policy", "edit")),
    Declared(BOUND, "gauge", "The daemon's `quality_bound` when this engine scored its last "
             "answer; 0: any."),
    Declared(LOOKUP, "histogram", "How long a request that could have started waited for its plan, "
             "in seconds."),
    Declared(LOAD, "histogram", "Loading the rows of a plan into the paged cache, on each worker, "
             "in seconds."),
)  # fmt: skip
_CALLED = {"lookups": "waits for plans", "loads": "loads"}
"""In vLLM's log. How long the daemon itself takes for a lookup, `kvshare log` says."""
SUMS = {"answers": SCORED, "tokens": SCORED_TOKENS, "regret": REGRET}
"""Of scores, each by policy, by how the tokens were chosen, and by kind of edit."""


@dataclass
class KVShareStats(KVConnectorStats):
    """What happened since the last step; in `data`: `tokens` by kind, `requests` by outcome and
    reason, `scores` by policy, choice of tokens and kind of edit, the `bound` on their quality, if
    that is known, and the durations of `lookups` and `loads`, seconds."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Nothing has happened."""
        self.data: dict[str, Any] = {
            "tokens": {}, "requests": {}, "scores": {}, "bound": None, "lookups": [], "loads": []
        }  # fmt: skip

    def is_empty(self) -> bool:
        """Whether nothing has happened."""
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Both together."""
        for kind, amount in other.data["tokens"].items():
            self.tokens(kind, amount)
        for outcome, reasons in other.data["requests"].items():
            for reason, amount in reasons.items():
                self.request(outcome, reason, amount)
        for of, sums in _scores(other.data):
            self.score(*of, sums)
        if other.data["bound"] is not None:
            self.data["bound"] = other.data["bound"]
        for name in ("lookups", "loads"):
            self.data[name] += other.data[name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log says of some seconds."""
        said: dict[str, int | float] = {
            f"KVShare {kind} tokens": self.data["tokens"].get(kind, 0) for kind in KINDS
        }
        requests = (sum(reasons.values()) for reasons in self.data["requests"].values())
        said["KVShare requests"] = sum(requests)
        for name, called in _CALLED.items():
            seconds = self.data[name]
            mean = sum(seconds) / len(seconds) if seconds else 0.0
            said[f"KVShare {called} mean (ms)"] = round(1e3 * mean, 3)
        return said

    # --- counting ----------------------------------------------------------------------------

    def tokens(self, kind: str, amount: int) -> None:
        """So many more tokens of a kind."""
        self.data["tokens"][kind] = self.data["tokens"].get(kind, 0) + amount

    def request(self, outcome: str, reason: str = "", amount: int = 1) -> None:
        """One more request that has ended."""
        reasons = self.data["requests"].setdefault(outcome, {})
        reasons[reason] = reasons.get(reason, 0) + amount

    def score(self, policy: str, chosen: str, edit: str, sums: Mapping[str, float]) -> None:
        """So many more `answers`, `tokens` and `diverged`, and so much `regret`."""
        by_choice = self.data["scores"].setdefault(policy, {})
        found = by_choice.setdefault(chosen, {}).setdefault(edit, {})
        for name, amount in sums.items():
            found[name] = found.get(name, 0) + amount


class Tally:
    """What the scheduler side has counted and vLLM has not taken yet."""

    def __init__(self) -> None:
        self._stats = KVShareStats()

    def ended(self, answer: dict[str, Any], *, computed: bool) -> None:
        """A request has ended. `answer`: what it says of reuse; `computed`: whether its prompt is.
        Of an aborted one nobody knows how many tokens were computed."""
        if not computed:
            self._stats.request("aborted")
            return
        for kind in KINDS:
            self._stats.tokens(kind, answer[PREFIX + kind])
        reused = Reused(*(answer[PREFIX + kind] for kind in Reused._fields))
        if reused.tokens:
            self._stats.request(reused.kind)
        else:
            self._stats.request("miss", answer[PREFIX + "reason"])

    def unserved(self, reason: str) -> None:
        """A request of a model that KVShare does not serve has ended."""
        self._stats.request("miss", reason)

    def looked_up(self, seconds: float) -> None:
        """A request has waited so long for its plan."""
        self._stats.data["lookups"].append(seconds)

    def scored(self, look: Look, regrets: Sequence[float]) -> None:
        """A second look has scored an answer."""
        greedy = look.greedy
        sums = {"answers": 1, "tokens": len(regrets), "regret": sum(regrets)}
        if greedy:
            sums["diverged"] = diverged_at(regrets) is not None
        self._stats.score(look.policy, "greedy" if greedy else "sampled", look.edit, sums)
        if look.bound is not None:
            self._stats.data["bound"] = look.bound

    def take(self) -> KVShareStats | None:
        """What was counted since the last call, if anything was."""
        if self._stats.is_empty():
            return None
        taken, self._stats = self._stats, KVShareStats()
        return taken


def loads(seconds: Sequence[float]) -> KVShareStats | None:
    """What a worker reports: how long its loads took."""
    if not seconds:
        return None
    stats = KVShareStats()
    stats.data["loads"] += seconds
    return stats


def _scores(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, float]]]:
    """Sums of scores, by policy, how tokens were chosen, and edit."""
    for policy, by_choice in data["scores"].items():
        for chosen, by_edit in by_choice.items():
            for edit, sums in by_edit.items():
                yield (policy, chosen, edit), sums


class KVSharePromMetrics(KVConnectorPromMetrics):
    """The same for Prometheus, in the process that answers `/metrics`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        makes = {
            "counter": metric_types[prometheus_client.Counter],
            "gauge": partial(metric_types[prometheus_client.Gauge], multiprocess_mode="mostrecent"),
            "histogram": partial(metric_types[prometheus_client.Histogram], buckets=list(BUCKETS)),
        }
        made = {
            one.name: makes[one.kind](one.name, one.help, [*labelnames, *one.labels])
            for one in DECLARED
        }
        self.tokens, self.requests = made[TOKENS], made[REQUESTS]
        self.scores = {name: made[at] for name, at in SUMS.items()}
        self.diverged, self.bound = made[DIVERGED], made[BOUND]
        self.lookups, self.loads = made[LOOKUP], made[LOAD]
        for engine in per_engine_labelvalues:  # from the beginning, so that rates are right
            for kind in KINDS:
                self._of(self.tokens, engine, kind)
            for outcome in OUTCOMES:
                self._of(self.requests, engine, outcome, "")
            self._of(self.lookups, engine)
            self._of(self.loads, engine)

    def _of(self, metric: Any, engine: int, *labels: str) -> Any:
        return metric.labels(*self.per_engine_labelvalues[engine], *labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine reports; `transfer_stats_data`: that of a `KVShareStats`."""
        for kind, amount in transfer_stats_data["tokens"].items():
            self._of(self.tokens, engine_idx, kind).inc(amount)
        for outcome, reasons in transfer_stats_data["requests"].items():
            for reason, amount in reasons.items():
                self._of(self.requests, engine_idx, outcome, reason).inc(amount)
        for of, sums in _scores(transfer_stats_data):
            self._score(engine_idx, of, sums)
        if transfer_stats_data["bound"] is not None:
            self._of(self.bound, engine_idx).set(transfer_stats_data["bound"])
        for seconds in transfer_stats_data["lookups"]:
            self._of(self.lookups, engine_idx).observe(seconds)
        for seconds in transfer_stats_data["loads"]:
            self._of(self.loads, engine_idx).observe(seconds)

    def _score(self, engine: int, of: tuple[str, str, str], sums: Mapping[str, float]) -> None:
        policy, chosen, edit = of
        for name, metric in self.scores.items():
            self._of(metric, engine, *of).inc(sums[name])
        if chosen == "greedy":
            self._of(self.diverged, engine, policy, edit).inc(sums["diverged"])


class Counted:
    """What vLLM asks the connector's class for, in processes that have no connector."""

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVShareStats:
        """What an engine reported, as it was counted there."""
        return KVShareStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVSharePromMetrics:
        """Where that is added up for Prometheus."""
        return KVSharePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
