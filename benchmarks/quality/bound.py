"""Does the bound on quality hold on recorded streams? Real requests are served under every rung of
the ladder once, then drawn again and again while `Quality` chooses their rungs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.data.chat_prompts import Chat
from benchmarks.harness.models import model_folder, model_name, tokenizer_of
from benchmarks.harness.result import SAMPLES, Cell, Options, Result
from benchmarks.methods.compared import engine_for
from benchmarks.quality.bound_prompts import STREAMS, Source
from benchmarks.quality.bound_recording import Recorded, Recorder, Recording, name_of
from benchmarks.quality.bound_replay import (
    AFTER,
    CONTROLS,
    RUNGS,
    SCORED,
    Outcome,
    Replayed,
    as_text,
    halves,
    replay,
)
from kvshare_store.cli.progress import track
from kvshare_store.quality.ladder import Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUNDS = (0.02, 0.05, 0.1)
CONFIDENCE = 0.95
AT_RANDOM, DRIFTING = "at random", "harmless half first"
RECORDED = "bound-recorded.jsonl"
"""Beside the samples: a run that was cut off goes on from it, and one that was not only replays."""


class Case(NamedTuple):
    """One stream in one order under one bound, and what became of it with each seed."""

    stream: str
    order: str
    bound: float
    laxest: float
    """Extra divergence if all requests got the configured policy."""
    replays: list[Replayed]


def measure(options: Options) -> Result:
    """Record what is not in the file yet, then replay."""
    count = options.size(60, 2)
    kept = Recording(options.out / SAMPLES / RECORDED)
    recorded, model = record(options, kept, count)
    outcomes = {name: list(map(outcome, of)) for name, of in recorded.items()}
    requests, seeds = (1000, 4) if options.short else (4000, 40)
    cases = list(track(replays(outcomes, requests, seeds), "Replaying streams"))
    return _result(options, model, recorded, cases, requests)


def record(options: Options, kept: Recording, count: int) -> tuple[dict[str, list[Recorded]], str]:
    """The streams, and the name of the model."""
    folder, model = model_folder(options), model_name(options)
    source = Source(options.data, Chat(folder), tokenizer_of(options))
    streams = {name: make(source, count, options.seed) for name, make in STREAMS.items()}
    recorder: Recorder | None = None
    # a request of each stream at a time: what is recorded so far is as good as a smaller sample
    for at in track(range(count), "Recording answers of all streams"):
        new = [of[at] for of in streams.values() if name_of(model, of[at]) not in kept]
        if new:
            recorder = recorder or Recorder(engine_for(options)[0], model, source.chat.stop)
            kept.add(recorder.record(new))
    found = {
        name: [kept[name_of(model, one)] for one in of[:count]] for name, of in streams.items()
    }
    return found, model


def outcome(one: Recorded) -> Outcome:
    """What the replay needs of a request."""
    return Outcome(
        one.kind,
        tuple(answer.edited > 0 for answer in one.rungs),
        tuple(answer.diverged for answer in one.rungs),
        one.control.diverged,
    )


def replays(
    streams: dict[str, list[Outcome]], requests: int, seeds: int, bounds: Sequence[float] = BOUNDS
) -> Iterator[Case]:
    """Every stream in both orders under every bound. Requests of which the configured policy makes
    exact ones are left out: nothing is decided of them."""
    for name, every in streams.items():
        pool = [one for one in every if one.edited[-1]]
        laxest = mean(one.extra(len(RUNGS)) for one in pool)
        for order, pools in ((AT_RANDOM, [pool]), (DRIFTING, halves(pool))):
            for bound in bounds:
                terms = Terms(bound, 1 - CONFIDENCE)
                made = [replay(pools, terms, requests, seed) for seed in range(seeds)]
                yield Case(name, order, bound, laxest, made)


# --- the result -----------------------------------------------------------------------------------

_COLUMNS = [
    "stream", "order", "bound", "without a bound", "extra at the end", "highest, mean",
    "highest of all", "counted", "within", "classes within", "approximate", "ends at",
]  # fmt: skip


def _result(
    options: Options, model: str, recorded: dict[str, list[Recorded]], cases: list[Case],
    requests: int,
) -> Result:  # fmt: skip
    every = list(chain(*recorded.values()))
    return Result(
        name="bound",
        title="The bound on quality, on recorded streams",
        n={"recorded requests": len(every), "streams": len(recorded),
           "requests of a replay": requests, "replays of each line": len(cases[0].replays)},
        seed=options.seed,
        model=f"{model}, float32, transformers",
        noise_floor=f"controls: {sum(one.control.diverged for one in every)} of {len(every)} "
        "answers of full compute diverge, decoded in a batch and scored in one forward",
        columns=_COLUMNS,
        rows=[_row(case) for case in cases],
        paper="not measured",
        notes=[*_NOTES, *(_described(name, of) for name, of in recorded.items())],
        targets=_targets(cases),
        series={
            "recorded": as_text({name: list(map(outcome, of)) for name, of in recorded.items()}),
            "curves": [[one.stream, one.order, one.bound, _highest(one)] for one in cases],
        },
    )  # fmt: skip


def _row(case: Case) -> list[Cell]:
    made = case.replays
    classes = [most <= case.bound for one in made for most in one.classes]
    last = Counter(one.last for one in made)
    return [
        case.stream, case.order, case.bound, case.laxest,
        mean(one.extra for one in made),
        mean(one.most for one in made),
        max(one.most for one in made),
        mean(one.counted for one in made),
        f"{_within(case)} of {len(made)}",
        f"{sum(classes)} of {len(classes)}",
        mean(one.edited for one in made),
        ", ".join(f"{name} {count}" for name, count in last.most_common()),
    ]  # fmt: skip


def _within(case: Case) -> int:
    return sum(one.most <= case.bound for one in case.replays)


def _targets(cases: Sequence[Case]) -> list[tuple[str, str, bool]]:
    """Each stream on its own, in each order, under all bounds together."""
    found = []
    for order in (AT_RANDOM, DRIFTING):
        ours = [case for case in cases if case.order == order]
        worst = min(ours, key=lambda case: _within(case) / len(case.replays))
        held, of = _within(worst), len(worst.replays)
        found.append((
            f"{order}: at least 95 % of the replays of every stream stay within every bound",
            f"worst: {held} of {of} ({worst.stream}, {worst.bound:.0%}); all: "
            f"{sum(map(_within, ours))} of {sum(len(case.replays) for case in ours)}",
            held >= CONFIDENCE * of,
        ))  # fmt: skip
    return found


_NOTES = [
    "Each stream: requests with a donor that differs as its requests do. Each request is served "
    "under every rung, from a store that holds its donor; its first 16 greedy tokens are scored by "
    "full compute, as engines score a served answer. A replay draws requests with replacement; "
    f"`{DRIFTING}`: from the half that diverges least until the middle, from the other one then. "
    f"`Quality` chooses each rung, at {CONFIDENCE:.0%} confidence, and sees the scores of "
    f"{SCORED:.0%} of the edited answers and {CONTROLS:.0%} of those in full, 20 answers late.",
    "`extra at the end`: the mean over all requests of the conditional rate of extra divergence. "
    "Given all that came before, the next request gets one of two rungs by a known chance, and the "
    "recording says how often a request of its class diverges under each beyond its own control. "
    "That mean is what is promised ([quality](../design/quality.md#the-ladder)). "
    f"`highest`: of this mean, at any request after the first {AFTER}; `within`: replays in which "
    "it never was beyond the bound. `counted`: answers that did diverge, less those that diverge "
    "in full, which is the same but for chance.",
    "`classes within`: the same of each class alone, with its own requests, if it had more than "
    f"{AFTER}. `without a bound`: extra divergence if all requests got `{RUNGS[-1]}`. "
    "`approximate`: share of the requests that got approximate rows. `ends at`: the policy of most "
    "of the last tenth of the requests, in how many replays.",
]


def _described(name: str, of: Sequence[Recorded]) -> str:
    """A stream in a line: length, classes, and each rung's divergence."""
    kinds = Counter(one.kind for one in of)
    parts = []
    for at, rung in enumerate(RUNGS):
        answers = [one.rungs[at] for one in of]
        edited = sum(one.edited for one in answers) / sum(one.tokens for one in of)
        ends = sum(one.end > 0 and not one.diverged for one in answers)
        parts.append(
            f"{rung} {sum(one.diverged for one in answers)} ({edited:.0%} of the tokens "
            f"approximate, mean regret {_regret(of, at):.3f} nats, {ends} end elsewhere)"
        )
    return (
        f"{name}: {len(of)} requests of {mean(one.tokens for one in of):.0f} tokens; "
        f"{', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}. "
        f"Diverge under {'; '.join(parts)}; in full {sum(one.control.diverged for one in of)}."
    )


def _regret(of: Sequence[Recorded], rung: int) -> float:
    scored = [one.rungs[rung].regrets for one in of if one.rungs[rung].regrets]
    return mean(mean(regrets) for regrets in scored) if scored else 0.0


def _highest(case: Case) -> list[float]:
    """The highest mean so far of all replays, at even distances."""
    return [max(at) for at in zip(*(one.curve for one in case.replays), strict=True)]


def draw(made: Result) -> Figure:
    """For each stream and order, the highest mean so far as a share of the bound."""
    from matplotlib.figure import Figure

    curves = made.series["curves"]
    streams = list(dict.fromkeys(stream for stream, *_ in curves))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(2, len(streams), sharex=True, sharey=True, squeeze=False)
    styles = dict(zip(BOUNDS, ("-", "--", ":"), strict=True))
    for stream, order, bound, curve in curves:
        own = axes[int(order == DRIFTING)][streams.index(stream)]
        at = [
            (point + 1) * made.n["requests of a replay"] / len(curve) for point in range(len(curve))
        ]
        own.plot(at, [value / bound for value in curve], styles[bound], color="black",
                 label=f"bound {bound:.0%}")  # fmt: skip
    for row, order in zip(axes, (AT_RANDOM, DRIFTING), strict=True):
        row[0].set_ylabel(order, fontsize=8)
        for own in row:
            own.axhline(1, color="black", linewidth=0.6)
    for own, stream in zip(axes[0], streams, strict=True):
        own.set_title(stream, fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("requests", fontsize=8)
    figure.supylabel("highest mean extra rate of all replays, ÷ bound", fontsize=8)
    return figure
