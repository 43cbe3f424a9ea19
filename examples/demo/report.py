"""From measurements to demo-report.json and a verdict."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.engines.engine import Answer

POLICY = "balanced"
"""What KVShare reuses in the demo."""
LONG = 1000
"""Tokens from which a prompt counts as long."""
LIGHT = 0.10
"""Share of a prompt's tokens up to which recomputing it counts as light."""


Times = dict[str, list[float]]
"""Seconds to first token, by what served the prompt; one value a repetition."""


@dataclass(frozen=True)
class Reuse:
    """Where a prompt's KV came from; the three numbers add up to its tokens."""

    exact: int
    edited: int
    recomputed: int


@dataclass
class FollowerResult:
    """One follower, measured by every arm in every repetition."""

    family: str
    ttfts: Times = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    reuses: list[Reuse] = field(default_factory=list)

    def add(self, arm: str, answer: Answer) -> None:
        """Keep every time, and the first repetition's answer."""
        self.ttfts.setdefault(arm, []).append(answer.ttft_s)
        self.answers.setdefault(arm, answer)

    def ttft(self, arm: str) -> float:
        """Median over the repetitions, seconds."""
        return statistics.median(self.ttfts[arm])

    @property
    def answered(self) -> bool:
        """Whether every arm gave at least one token."""
        return all(answer.token_ids for answer in self.answers.values())

    @property
    def reuse(self) -> Reuse:
        """The repetition with the median number of recomputed tokens."""
        ranked = sorted(self.reuses, key=lambda reuse: reuse.recomputed)
        return ranked[(len(ranked) - 1) // 2]


@dataclass
class Results:
    """Everything one run measured."""

    followers: list[FollowerResult] = field(default_factory=list)
    misses: list[Times] = field(default_factory=list)
    """For each unrelated prompt: the times of `full` and `kvshare`."""
    repeated: list[Times] = field(default_factory=list)
    """For each prompt sent twice: the time of `full`, and of the second time (`again`)."""
    errors: dict[str, int] = field(default_factory=dict)
    """Errors that the store counted, by kind."""


# --- the report -----------------------------------------------------------------------------------


def build_report(engine: str, model: str, results: Results) -> dict[str, Any]:
    """The content of demo-report.json."""
    rows = [follower_row(follower) for follower in results.followers]
    return {
        "engine": engine,
        "model": model,
        "machine": machine(),
        "followers": rows,
        "summary": summarise(rows, results),
    }


def follower_row(follower: FollowerResult) -> dict[str, Any]:
    """One follower as it stands in the report."""
    full, prefix, ours = (follower.answers[arm] for arm in ("full", "prefix", "kvshare"))
    return {
        "family": follower.family,
        "tokens": full.tokens,
        "reused_exact": follower.reuse.exact,
        "reused_edited": follower.reuse.edited,
        "recomputed": follower.reuse.recomputed,
        "ttft_full_s": round(follower.ttft("full"), 5),
        "ttft_prefix_s": round(follower.ttft("prefix"), 5),
        "ttft_kvshare_s": round(follower.ttft("kvshare"), 5),
        "first_token_same": full.token_ids[:1] == ours.token_ids[:1],
        "rougeL_vs_full": round(rouge_l(full.text, ours.text), 4),
        "rougeL_prefix_vs_full": round(rouge_l(full.text, prefix.text), 4),
    }


def summarise(rows: Sequence[dict[str, Any]], results: Results) -> dict[str, Any]:
    """The numbers one would quote, each as a ratio of two measurements of this run."""
    long = [row for row in rows if row["tokens"] >= LONG]
    light = [row for row in long if row["recomputed"] <= LIGHT * row["tokens"]]
    tokens = sum(row["tokens"] for row in rows)
    reused = sum(row["reused_exact"] + row["reused_edited"] for row in rows)
    return {
        "median_speedup_vs_full": median(speedups(rows, "full")),
        "median_speedup_vs_prefix": median(speedups(rows, "prefix")),
        "share_reused": rounded(reused / tokens) if tokens else None,
        "first_token_agreement": mean([row["first_token_same"] for row in rows]),
        "miss_overhead": median([ratio(times, "kvshare", "full") - 1 for times in results.misses]),
        "misses": len(results.misses),
        "mean_rougeL_vs_full": mean([row["rougeL_vs_full"] for row in rows]),
        "speedup_1k_10pct": {"median": median(speedups(light, "full")), "n": len(light)},
        "speedup_1k_balanced": {"median": median(speedups(long, "full")), "n": len(long)},
        "identical_again_speedup": median(
            [ratio(times, "full", "again") for times in results.repeated]
        ),
        "noise_floor": noise_floor(results.followers),
        "store_errors": results.errors,
    }


def noise_floor(followers: Sequence[FollowerResult]) -> dict[str, Any]:
    """How far two ways of computing the same thing exactly differ on this machine.

    With a cached prefix the engine computes the very same KV in batches of other sizes, so only the
    rounding differs. Reuse of edited KV cannot be asked to agree with full prefill more than this.
    """
    pairs = [(follower.answers["full"], follower.answers["prefix"]) for follower in followers]
    return {
        "first_token_agreement": mean([a.token_ids[:1] == b.token_ids[:1] for a, b in pairs]),
        "mean_rougeL_vs_full": mean([rouge_l(a.text, b.text) for a, b in pairs]),
    }


def speedups(rows: Iterable[dict[str, Any]], arm: str) -> list[float]:
    """How many times sooner KVShare's first token came than that arm's."""
    return [row[f"ttft_{arm}_s"] / row["ttft_kvshare_s"] for row in rows]


def ratio(times: Times, over: str, under: str) -> float:
    """Median time of one way, as a multiple of the other's."""
    return statistics.median(times[over]) / statistics.median(times[under])


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return rounded(statistics.median(values)) if values else None


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return rounded(statistics.fmean(values)) if values else None


def rounded(value: float) -> float:
    """Four digits: more would be noise."""
    return round(value, 4)


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L F-measure of two texts; equal texts score 1 even when they have no words."""
    if reference == answer:
        return 1.0
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def machine() -> dict[str, Any]:
    """The machine: processor, cores, and whether it has AMX."""
    cpu = cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "amx": "amx_tile" in cpu.get("flags", "").split(),
    }


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Linux's facts about the first CPU; empty elsewhere."""
    try:
        first = path.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


# --- the verdict ----------------------------------------------------------------------------------


def problems(results: Results) -> list[str]:
    """Reasons why the demo failed, a line each; empty if it worked."""
    silent = [f.family for f in results.followers if not f.answered]
    found = []
    if not results.followers or silent:
        found.append(f"not every follower was answered: {', '.join(silent) or 'none was sent'}")
    if not any(follower.reuse.edited for follower in results.followers):
        found.append("no follower reused edited KV")
    if errors := {kind: count for kind, count in results.errors.items() if count}:
        found.append(f"the store counted errors: {errors}")
    return found
