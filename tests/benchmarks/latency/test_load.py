"""The traffic of `load`, and its rows."""

import math

import pytest

from benchmarks.data.edited_prompts import Texts
from benchmarks.harness.engines import Replayed
from benchmarks.latency import load
from tests.benchmarks.made_prompts import numbers


def test_load_says_what_each_arm_serves_and_its_times_beside_plain() -> None:
    def phase(share: float, rate: float) -> load.Phase:
        plain, ours = Replayed([1.0, 2.0, 6.0], 4.0), Replayed([0.5, 1.0, 9.0], 3.0)
        return load.Phase(share, rate, {"plain": plain, "prefix": plain, "kvshare": ours}, 1.0, {})

    assert load.row_of(phase(math.inf, math.inf), "kvshare")[:4] == ["at once", "-", "kvshare", 1.0]
    name, rate, _, served, p50, p99, *beside = load.row_of(phase(0.8, 0.6), "kvshare")
    assert (name, rate, served, p50, p99) == ("80%", 0.6, 1.0, 1000, 9000)
    assert beside == pytest.approx([0.5, 10.5 / 9, 1.5])


def test_traffic_is_half_new_and_the_same_for_one_seed() -> None:
    from random import Random

    sent = load.traffic(Texts(numbers()), 20, Random(1))
    again = load.traffic(Texts(numbers()), 20, Random(1))
    assert sent == again
    assert sent.arrivals == sorted(sent.arrivals)
    known = {token for donor in sent.donors for token in donor}
    shares = [sum(token in known for token in prompt) / len(prompt) for prompt in sent.prompts]
    assert sum(share == 0 for share in shares) == 10
    assert sum(share >= 0.74 for share in shares) == 10


def test_the_bound_by_tokens_counts_what_each_arm_must_compute() -> None:
    donor = list(range(100, 612))
    follower = [7, *donor[1:]]
    sent = load.Traffic([donor], [donor, follower], [0.0, 0.0])
    left = load.to_compute(sent)
    assert left["prefix_caching"] == 16 + 512  # the last block is computed again; then all
    assert 2 <= left["balanced"] < 100  # the last token, the edit and a short window
