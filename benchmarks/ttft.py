"""Time to first token of prompts whose text is partly known: full prefill, prefix caching, KVShare.

For each length: a text is stored, then prompts arrive that share a part of it. See
`docs/design/benchmarks.md` for how it is timed.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from rich.progress import Progress

from benchmarks.edited import SCATTERED, Texts, follower, long_texts
from benchmarks.engines import (
    Engine,
    Home,
    Timed,
    engine_settings,
    in_turn,
    model_folder,
    started,
    temporary_home,
)
from benchmarks.result import Cell, Options, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = {256: 5, 512: 5, 1024: 5, 2048: 3, 4096: 3, 8160: 1}
"""Tokens of a prompt, and how often everything is measured at that length."""
SHORT_LENGTHS = {512: 2, 2048: 1}
POLICIES = ("balanced", "faithful", "aggressive")
TARGET_LENGTHS, TARGET_RECOMPUTED, TARGET_SHARE = (2048, 4096), 0.10, 0.65


class Prompt(NamedTuple):
    """One kind of follower, and who serves it."""

    share: float
    """Of its tokens that the donor has."""
    places: int
    """At which it differs: 1 or `SCATTERED`."""
    prefix: bool
    """Whether prefix caching serves it too."""
    host: Sequence[str]
    """Policies that serve it with all rows in the host tier; `exact` last: it stores exact rows."""
    disk: Sequence[str] = ()
    """Policies that serve it with all rows on disk only."""

    @property
    def edits(self) -> str:
        """In words."""
        return "none" if not self.share else "one" if self.places == 1 else "scattered"


PROMPTS = (
    Prompt(0.0, 1, True, ("balanced",)),
    Prompt(0.50, SCATTERED, True, POLICIES, ("balanced",)),
    Prompt(0.75, SCATTERED, False, POLICIES, ("balanced",)),
    Prompt(0.90, SCATTERED, True, (*POLICIES, "exact"), (*POLICIES, "exact")),
    Prompt(0.95, SCATTERED, False, POLICIES, ("balanced",)),
    Prompt(0.90, 1, True, (*POLICIES, "exact")),
    Prompt(0.95, 1, False, POLICIES),
)
SHORT_PROMPTS = (
    Prompt(0.0, 1, True, ("balanced",)),
    Prompt(0.90, SCATTERED, True, ("balanced", "aggressive"), ("balanced",)),
    Prompt(0.95, 1, False, ("balanced",)),
)


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
        """Speed-up as a share of the one if time went with the tokens computed."""
        return self.recomputed / self.times_full


class Grid:
    """One run: engines, store, and what has been measured so far."""

    def __init__(self, engines: dict[str, Engine], home: Home, texts: Texts) -> None:
        self.engines, self.home, self.texts = engines, home, texts
        self.samples: dict[Key, list[Sample]] = defaultdict(list)
        self.declined: dict[str, int] = {}
        self._run = uuid.uuid4().hex[:8]
        self._turn = 0

    def warm_up(self) -> None:
        """Every path once, with a prompt that is not reported."""
        base = self.texts.take(1024)
        self._store(base, "warm-up")
        made = follower(base, 0.9, SCATTERED, self.texts)
        for engine in self.engines.values():
            engine.ask(made, f"{self._run}-warm-up")

    def measure(self, length: int, prompts: Sequence[Prompt], repetition: int) -> Iterator[None]:
        """Store one text and serve all followers of it."""
        base = self.texts.take(length)
        salt = f"{length}-{repetition}"
        self._store(base, salt)
        yield
        for prompt in prompts:
            self._serve(prompt, follower(base, prompt.share, prompt.places, self.texts), salt)
            yield

    def _store(self, base: list[int], salt: str) -> None:
        self.engines["prefix"].forget()
        for name in ("prefix", "kvshare"):
            self.engines[name].ask(base, f"{self._run}-{salt}")
        self._rest()

    def _rest(self) -> None:
        """Wait until the store has kept what it was sent and the machine is quiet again."""
        self.engines["kvshare"].settle()
        self.home.flush()
        self.home.wait_idle()

    def _serve(self, prompt: Prompt, tokens: list[int], salt: str) -> None:
        """All arms in turn. Exact rows of the prompt itself would serve everyone after them."""
        self._turn += 1
        edited = [f"host {policy}" for policy in prompt.host if policy != "exact"]
        edited += [f"disk {policy}" for policy in prompt.disk if policy != "exact"]
        last = [f"{tier} exact" for tier in ("disk", "host") if "exact" in getattr(prompt, tier)]
        arms = in_turn(["full", *["prefix"] * prompt.prefix, *edited], self._turn) + last
        served: dict[str, tuple[Timed, float]] = {}
        for arm in arms:
            served[arm] = self._ask(arm, tokens, f"{self._run}-{salt}")
        for arm, (timed, recomputed) in served.items():
            key = Key(len(tokens), prompt.share, prompt.edits, arm)
            self.samples[key].append(Sample(timed, served["full"][0], recomputed))

    def _ask(self, arm: str, tokens: list[int], salt: str) -> tuple[Timed, float]:
        if arm in ("full", "prefix"):
            timed = self.engines[arm].ask(tokens, salt)
            return timed, 1 - timed.cached / timed.tokens
        tier, _, policy = arm.partition(" ")
        if tier == "disk":
            self._empty_host()
        before = self.home.stats()
        timed = self.engines["kvshare"].ask(tokens, salt, policy=policy)
        self._rest()
        after = self.home.stats()
        for reason, count in after["declined"].items():
            more = count - before["declined"].get(reason, 0)
            self.declined[reason] = self.declined.get(reason, 0) + more
        computed = after["tokens_recomputed"] - before["tokens_recomputed"]
        return timed, computed / timed.tokens

    def _empty_host(self) -> None:
        self.home.restart()
        for _ in range(2):  # the engine notices with the first one and greets with the second
            self.engines["kvshare"].ask(self.texts.take(8), "nobody")


def measure(options: Options) -> Result:
    """Serve the grid."""
    lengths = SHORT_LENGTHS if options.short else LENGTHS
    if options.n is not None:
        lengths = dict.fromkeys(lengths, options.n)
    prompts = SHORT_PROMPTS if options.short else PROMPTS
    folder, name = model_folder(options.model)
    # a request may ask for a stricter policy than the configured one, never for a laxer one;
    # edited followers must not serve others, and embeddings have a measurement of their own
    fields = {"policy": "aggressive", "max_generation": 1, "semantic": "never"}
    with temporary_home(**fields) as home:
        settings = {
            "full": engine_settings(folder, caching=False),
            "prefix": engine_settings(folder, caching=True),
            "kvshare": engine_settings(folder, caching=False, **home.settings()),
        }
        with Progress() as progress, started(settings) as engines:
            from transformers import AutoTokenizer

            texts = long_texts(options.data, AutoTokenizer.from_pretrained(folder))
            grid = Grid(engines, home, texts)
            steps = sum(lengths.values()) * (len(prompts) + 1)
            task = progress.add_task("Serving prompts", total=steps)
            grid.warm_up()
            for repetition in range(max(lengths.values())):
                for length in (size for size, times in lengths.items() if repetition < times):
                    for _ in grid.measure(length, prompts, repetition):
                        progress.advance(task)
    return result(grid, options, name)


# --- from samples to a table ----------------------------------------------------------------------


def result(grid: Grid, options: Options, model: str) -> Result:
    """The table and the target."""
    samples = {key: grid.samples[key] for key in sorted(grid.samples)}
    return Result(
        name="ttft",
        title="Time to first token by length, share in common, tier and policy",
        n={"prompts": sum(len(s) for key, s in samples.items() if key.arm == "full")},
        seed=options.seed,
        model=model,
        noise_floor=_noise(samples),
        columns=["tokens", "in common", "edits", "arm", "n", "computed", "ms", "times full",
                 "min to max", "of ideal"],
        rows=[_row(key, values) for key, values in samples.items()],
        paper="a good balance of TTFT and accuracy, in words only; no time is given",
        notes=[*_parts_in_words(samples), _declines(grid.declined)],
        targets=[_target(samples)],
        series={"parts": _parts(samples), "ideal": _ideal(samples)},
    )  # fmt: skip


def _row(key: Key, values: list[Sample]) -> list[Cell]:
    times = sorted(sample.times_full for sample in values)
    computed = median(sample.recomputed for sample in values)
    shown = key.arm if key.arm in ("full", "prefix") else f"kvshare {key.arm}"
    return [
        key.length, f"{key.share:.0%}", key.edits, shown, len(values), f"{computed:.1%}",
        median(sample.timed.ttft_s for sample in values) * 1e3, median(times),
        f"{times[0]:.2f} to {times[-1]:.2f}",
        None if key.arm == "full" else median(sample.of_ideal for sample in values),
    ]  # fmt: skip


def _noise(samples: dict[Key, list[Sample]]) -> str:
    """Full prefill of different prompts of one length, against their median."""
    spread = []
    for length in {key.length for key in samples}:
        times = [
            sample.timed.ttft_s
            for key, values in samples.items()
            if key.length == length and key.arm == "full"
            for sample in values
        ]
        spread += [abs(time / median(times) - 1) for time in times]
    return (
        f"full prefill of other prompts of the same length: median deviation {median(spread):.1%}"
    )


def _target(samples: dict[Key, list[Sample]]) -> tuple[str, str, bool]:
    cells = [
        median(sample.of_ideal for sample in values)
        for key, values in samples.items()
        if key.length in TARGET_LENGTHS
        and key.arm.startswith("host")
        and median(sample.recomputed for sample in values) <= TARGET_RECOMPUTED
    ]
    what = "≥ 65 % of the ideal TTFT at 2k to 4k tokens with ≤ 10 % recomputed, host tier"
    if not cells:
        return what, "no prompt with so little recomputed", False
    measured = f"median of {len(cells)} settings {median(cells):.0%}, lowest {min(cells):.0%}"
    return what, measured, median(cells) >= TARGET_SHARE


def _declines(declined: dict[str, int]) -> str:
    counted = ", ".join(f"{reason} {count}" for reason, count in declined.items() if count)
    return f"KVShare declined: {counted or 'nothing'}"


# --- where the time goes --------------------------------------------------------------------------

_PARTS_OF = (0.90, "scattered", "balanced")


def _parts(samples: dict[Key, list[Sample]]) -> dict[str, dict[str, float]]:
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


def _parts_in_words(samples: dict[Key, list[Sample]]) -> list[str]:
    return [
        f"{name}, balanced, 90 % in common, ms: "
        + ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
        for name, parts in _parts(samples).items()
    ]


def _ideal(samples: dict[Key, list[Sample]]) -> dict[str, list[tuple[int, float]]]:
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
