"""What a plan saves, and what is counted."""

from __future__ import annotations

import math
import threading

import pytest

from kvshare_store.lookup.cost import CostModel, Rate
from kvshare_store.observability.metrics import BUCKETS, Metrics


def test_a_rate_is_the_median_of_what_was_measured() -> None:
    rate = Rate(1000.0, smallest=1)
    assert rate.seconds(500) == 0.5
    rate.observe(100, 2.0)
    assert rate.value == 50.0
    rate.observe(100, 1.0)
    rate.observe(100, 1e-6)  # one that is far off does no harm
    assert rate.value == 100.0
    for _ in range(100):
        rate.observe(300, 1.0)
    assert rate.value == 300.0


@pytest.mark.parametrize(
    ("amount", "seconds"), [(0, 1.0), (9, 1.0), (10, 0.0), (-5, 1.0), (15, -1.0)]
)
def test_measurements_that_say_nothing_are_ignored(amount: float, seconds: float) -> None:
    rate = Rate(1000.0, smallest=10)
    rate.observe(amount, seconds)
    assert rate.value == 1000.0


def test_a_rate_is_assumed_until_it_is_measured() -> None:
    rate = Rate(1000.0, smallest=10)
    assert rate.assumed == 1000.0
    rate.observe(1, 1.0)
    assert rate.assumed == 1000.0, "too little to count"
    rate.observe(100, 1.0)
    assert (rate.value, rate.assumed) == (100.0, 0.0)
    rate.doubt()
    assert rate.assumed == 1000.0


def test_doubt_forgets_what_is_never_measured_again() -> None:
    rate = Rate(1000.0, smallest=1)
    rate.doubt()
    assert rate.value == 1000.0
    for speed in (1.0, 2.0, 3.0):
        rate.observe(speed, 1.0)
    seen = [rate.value]
    for _ in range(3):
        rate.doubt()
        seen.append(rate.value)
    assert seen == [2.0, 2.5, 3.0, 1000.0]
    cost = CostModel()
    cost.load["host"].observe(1 << 30, 1e3)
    assert cost.saving_ms(100, 0, {"host": 1 << 20}) < 0
    cost.doubt()
    assert cost.saving_ms(100, 0, {"host": 1 << 20}) > 0


def test_saving() -> None:
    cost = CostModel()
    cost.prefill.value = 1000.0
    cost.load["host"].value, cost.load["disk"].value = 1e6, 1e5
    assert cost.saving_ms(100, 0, {}) == pytest.approx(100.0)
    assert cost.saving_ms(100, 0, {"host": 50_000}) == pytest.approx(50.0)
    assert cost.saving_ms(100, 0, {"host": 10_000, "disk": 5_000}) == pytest.approx(40.0)
    assert cost.saving_ms(100, 1000, {}) == pytest.approx(50.0)
    assert cost.saving_ms(0, 1, {"disk": 1}) < 0


def test_counts_labels_and_errors_are_apart() -> None:
    metrics = Metrics()
    metrics.add("lookups")
    metrics.add("lookups", 4)
    metrics.decline("no_donor")
    metrics.error("corrupt")
    metrics.error("corrupt")
    assert metrics.counts(("lookups", "never")) == {"lookups": 5, "never": 0}
    assert metrics.declined == {"no_donor": 1}
    assert metrics.errors == {"corrupt": 2}


def quantiles(metrics: Metrics, name: str) -> tuple[float, float]:
    report = metrics.durations((name,))[name]
    return report["p50"], report["p99"]


def test_quantiles() -> None:
    metrics = Metrics()
    assert quantiles(metrics, "load") == (0.0, 0.0)
    for at in range(101):
        metrics.observe("load", float(at))
    assert quantiles(metrics, "load") == (50.0, 99.0)
    for _ in range(10_000):
        metrics.observe("load", 7.0)
    assert quantiles(metrics, "load") == (7.0, 7.0)
    assert quantiles(metrics, "save") == (0.0, 0.0)


def test_a_histogram_counts_each_duration_in_every_bucket_that_it_fits_into() -> None:
    metrics = Metrics()
    for seconds in (0.0, BUCKETS[0], 0.3, 99.0):
        metrics.observe("load", seconds)
    report = metrics.durations(("load",))["load"]
    upper = dict(zip([*BUCKETS, math.inf], report["buckets"], strict=True))
    assert (upper[BUCKETS[0]], upper[0.2], upper[0.5], upper[10.0]) == (2, 2, 3, 3)
    assert upper[math.inf] == 4
    assert report["sum"] == pytest.approx(99.3 + BUCKETS[0])


def test_namespaces_past_the_first_are_counted_together() -> None:
    metrics = Metrics()
    digests = [f"{number:064x}"[::-1] for number in range(130)]
    for digest in digests:
        metrics.used(digest, "exact", {"exact": 3}, known=True)
    usage = metrics.usage()
    assert len(usage) == 101
    assert usage["other"] == {"requests": {"exact": 30}, "tokens": {"exact": 90}}
    metrics.forget(digests[0])
    assert digests[0][:12] not in metrics.usage(), "a tenant that was purged leaves no trace"


def test_namespaces_without_a_prompt_take_no_labels() -> None:
    metrics = Metrics()
    digests = [f"{number:064x}"[::-1] for number in range(230)]
    for digest in digests[:130]:
        metrics.used(digest, "miss", {"not_reused": 3}, known=False)
    assert list(metrics.usage()) == ["other"]
    assert metrics.labels(digests[130:]) == [digest[:12] for digest in digests[130:]]
    assert metrics.labels(digests[:1]) == ["other"]


def test_a_failure_is_timed_too() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="broken"), metrics.timed("save"):
        raise ValueError("broken")
    assert quantiles(metrics, "save")[0] > 0


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(2000):
            metrics.add("lookups")
            metrics.decline("no_donor")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.counts(("lookups",)) == {"lookups": 8000}
    assert metrics.declined == {"no_donor": 8000}
