"""From the samples of `ttft` to a table, a verdict and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.harness.engines import Timed
from benchmarks.harness.result import Cell, Options, Result
from kvshare_store.config import StoreConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_LENGTHS, TARGET_RECOMPUTED, TARGET_SHARE = (2048, 4096), 0.10, 0.65
DEADLINE_MS = 10_000.0
"""Deadline of a plan, long enough to measure reads from disk in full."""


class Key(NamedTuple):
    """One row of the table."""

    length: int
    share: float
    edits: str
    arm: str


class Sample(NamedTuple):
    """One prompt served by one arm, beside full prefill of the same prompt."""

    timed: Timed
    full: Timed
    recomputed: float
    """Share of the prompt's tokens that were computed."""

    @property
    def times_full(self) -> float:
        """Time to first token as a multiple of full prefill's."""
        return self.timed.ttft_s / self.full.ttft_s

    @property
    def of_ideal(self) -> float:
        """Speed-up by the ideal one: time in proportion to the tokens computed."""
        return self.recomputed / self.times_full


Samples = Mapping[Key, list[Sample]]
"""What was measured, by row of the table."""


def result(measured: Samples, declined: dict[str, int], options: Options, model: str) -> Result:
    """The table and the target."""
    samples = {key: measured[key] for key in sorted(measured)}
    return Result(
        name="ttft",
        title="Time to first token by length, share in common, tier and policy",
        n={"prompts": sum(len(s) for key, s in samples.items() if key.arm == "full")},
        seed=options.seed,
        model=model,
        noise_floor=noise_of(samples),
        columns=["tokens", "in common", "arm", "n", "computed", "ms", "/ full", "min", "max",
                 "of ideal"],
        rows=[_row(key, values) for key, values in samples.items()],
        paper="a good balance of TTFT and accuracy, in words only; no time is given",
        notes=[*_parts_in_words(samples), _declines(declined), _late(samples)],
        targets=[target_of(samples, tier) for tier in ("host", "disk")],
        series={"parts": _parts(samples), "ideal": _ideal(samples)},
    )  # fmt: skip


def _row(key: Key, values: list[Sample]) -> list[Cell]:
    times = sorted(sample.times_full for sample in values)
    computed = median(sample.recomputed for sample in values)
    shown = key.arm if key.arm in ("full", "prefix") else f"kvshare {key.arm}"
    common = f"{key.share:.0%}, {key.edits}" if key.share else "0%"
    return [
        key.length, common, shown, len(values), f"{computed:.1%}",
        round(median(sample.timed.ttft_s for sample in values) * 1e3), median(times),
        times[0], times[-1],
        None if key.arm == "full" else median(sample.of_ideal for sample in values),
    ]  # fmt: skip


def noise_of(samples: Samples) -> str:
    """Full prefill of different prompts of one length, and two engines that do the same."""
    spread = []
    for length in {key.length for key in samples}:
        times = [
            sample.timed.ttft_s
            for key, values in samples.items()
            if key.length == length and key.arm == "full"
            for sample in values
        ]
        spread += [abs(time / median(times) - 1) for time in times]
    beside = [
        median(sample.times_full for sample in values)
        for key, values in samples.items()
        if key.arm == "prefix" and not key.share
    ]
    words = (
        f"full prefill of other prompts of the same length: median deviation {median(spread):.1%}"
    )
    if beside:
        words += (
            "; two engines that do the same, prefix caching with nothing in common and full: "
            f"{min(beside):.2f} to {max(beside):.2f} times, by length"
        )
    return words


def target_of(samples: Samples, tier: str) -> tuple[str, str, bool]:
    """The verdict is on the median of the settings; the text gives each length too."""
    settings = [
        (key.length, median(sample.of_ideal for sample in values))
        for key, values in samples.items()
        if key.length in TARGET_LENGTHS
        and key.arm.startswith(tier)
        and median(sample.recomputed for sample in values) <= TARGET_RECOMPUTED
    ]
    what = "≥ 65 % of the ideal TTFT at 2k to 4k tokens with ≤ 10 % recomputed, "
    what += f"{tier} tier"
    if not settings:
        return what, "no prompt with so little recomputed", False
    shares = [share for _, share in settings]
    by_length = [
        f"{length} tokens: {median(some):.0%}, {sum(s >= TARGET_SHARE for s in some)} of "
        f"{len(some)} reach it"
        for length in TARGET_LENGTHS
        if (some := [share for its, share in settings if its == length])
    ]
    measured = (
        f"median of {len(shares)} settings {median(shares):.0%}, lowest {min(shares):.0%} "
        f"({'; '.join(by_length)})"
    )
    return what, measured, median(shares) >= TARGET_SHARE


def _declines(declined: dict[str, int]) -> str:
    counted = ", ".join(f"{reason} {count}" for reason, count in declined.items() if count)
    return f"KVShare declined: {counted or 'nothing'}"


def _late(samples: Samples) -> str:
    """Which lookups the default deadline would have ended."""
    limit = StoreConfig().plan_deadline_ms
    of_disk = [s for key, values in samples.items() if key.arm.startswith("disk") for s in values]
    late = [s.timed.tokens for s in of_disk if s.timed.parts["lookup"] * 1e3 > limit]
    shortest = f", the shortest of {min(late)} tokens" if late else ""
    return (
        f"{len(late)} of {len(of_disk)} lookups that read from disk took longer than the default "
        f"plan_deadline_ms of {limit:.0f}{shortest}; with it the first such request is a miss and "
        f"the next one a hit (here the limit is {DEADLINE_MS:.0f})"
    )


# --- where the time goes --------------------------------------------------------------------------

_PARTS_OF = (0.90, "scattered", "balanced")


def _parts(samples: Samples) -> dict[str, dict[str, float]]:
    """Milliseconds of each part at 90 % in common, by `tokens tier`; medians."""
    share, edits, policy = _PARTS_OF
    made = {}
    for key, values in samples.items():
        tier, _, name = key.arm.partition(" ")
        if (key.share, key.edits, name) == (share, edits, policy):
            parts = values[0].timed.parts
            made[f"{key.length} {tier}"] = {
                part: median(sample.timed.parts[part] for sample in values) * 1e3 for part in parts
            }
    return made


def _parts_in_words(samples: Samples) -> list[str]:
    return [
        f"{name}, balanced, 90 % in common, ms: "
        + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        for name, parts in _parts(samples).items()
    ]


def _ideal(samples: Samples) -> dict[str, list[tuple[int, float]]]:
    """Share of the ideal by length, for each share in common; balanced, host, scattered."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, values in samples.items():
        if key.arm == "host balanced" and key.edits == "scattered":
            point = (key.length, median(sample.of_ideal for sample in values))
            lines.setdefault(f"{key.share:.0%}", []).append(point)
    return lines


def draw(made: Result) -> Figure:
    """Share of the ideal by length, and where the time goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    styles = zip(("o-", "s--", "^:", "d-."), sorted(made.series["ideal"].items()), strict=False)
    for style, (share, points) in styles:
        left.plot(*zip(*points, strict=True), style, color="black", label=f"{share} in common")
    left.axhline(TARGET_SHARE, color="grey", linewidth=0.8)
    left.set(xscale="log", xlabel="tokens of the prompt", ylabel="share of the ideal speed-up")
    left.set_ylim(bottom=0)
    lengths = sorted({at for line in made.series["ideal"].values() for at, _ in line})
    left.set_xticks(lengths, [str(length) for length in lengths])
    left.minorticks_off()
    left.legend()
    hatches = ("", "//", "xx", "..", "\\\\", "oo", "--", "++", "**")
    parts: dict[str, dict[str, float]] = made.series["parts"]
    bottom = [0.0] * len(parts)
    for index, part in enumerate(next(iter(parts.values()), {})):
        sizes = [values[part] / sum(values.values()) for values in parts.values()]
        grey = str(1 - index / 12)
        right.bar(list(parts), sizes, bottom=bottom, color=grey, hatch=hatches[index],
                  edgecolor="black", linewidth=0.5, label=part)  # fmt: skip
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    right.tick_params(axis="x", rotation=60)
    right.set_ylabel("share of the time to first token")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
