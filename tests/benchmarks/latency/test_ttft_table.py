"""From the samples of `ttft` to a verdict."""

import pytest

from benchmarks.harness.engines import Timed
from benchmarks.latency import ttft_table


def timed(seconds: float, tokens: int = 2048, token_ids: tuple[int, ...] = (1,)) -> Timed:
    parts = {"lookup": seconds / 4, "prefill": seconds / 2, "rest": seconds / 4}
    return Timed(seconds, tokens, 0, list(token_ids), "", parts)


def test_the_share_of_the_ideal_is_speed_up_times_what_was_computed() -> None:
    sample = ttft_table.Sample(timed(0.2), timed(1.0), 0.1)
    assert sample.times_full == pytest.approx(0.2)
    assert sample.of_ideal == pytest.approx(0.5)


def test_only_settings_that_the_target_is_about_decide_it() -> None:
    def key(length: int, arm: str) -> ttft_table.Key:
        return ttft_table.Key(length, 0.9, "scattered", arm)

    good, bad = (
        ttft_table.Sample(timed(0.1), timed(1.0), 0.08),
        ttft_table.Sample(timed(0.9), timed(1.0), 0.08),
    )
    much = ttft_table.Sample(timed(0.9), timed(1.0), 0.5)
    samples = {
        key(2048, "host balanced"): [good],
        key(2048, "host faithful"): [much],
        key(2048, "disk balanced"): [bad],
        key(256, "host balanced"): [bad],
    }
    _, measured, reached = ttft_table.target_of(samples, "host")
    assert reached
    assert measured == "median of 1 settings 80%, lowest 80% (2048 tokens: 80%, 1 of 1 reach it)"
    assert not ttft_table.target_of(samples, "disk")[2]
    assert not ttft_table.target_of({key(4096, "host aggressive"): [bad]}, "host")[2]
    assert not ttft_table.target_of({key(2048, "host faithful"): [much]}, "host")[2]


def test_two_engines_that_do_the_same_are_part_of_the_noise() -> None:
    def key(arm: str, share: float = 0.0, length: int = 2048) -> ttft_table.Key:
        return ttft_table.Key(length, share, "one", arm)

    samples = {
        key("full"): [ttft_table.Sample(timed(1.0), timed(1.0), 1.0)],
        key("prefix"): [ttft_table.Sample(timed(0.9), timed(1.0), 1.0)],
        key("prefix", length=512): [ttft_table.Sample(timed(1.1), timed(1.0), 1.0)],
        key("prefix", share=0.9): [ttft_table.Sample(timed(0.1), timed(1.0), 0.1)],
        key("full", length=512): [ttft_table.Sample(timed(1.0), timed(1.0), 1.0)],
    }
    assert "0.90 to 1.10 times" in ttft_table.noise_of(samples)
    alone = ttft_table.noise_of({key("full"): samples[key("full")]})
    assert alone.endswith("median deviation 0.0%")
