"""Recorded requests of agents and of conversations, replayed: tokens left to compute, beside prefix
caching alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.data import agents
from benchmarks.data.chat_histories import side_by_side, supported, talked
from benchmarks.harness.models import model_folder, model_name, tokenizer_of
from benchmarks.harness.plots import LINES
from benchmarks.harness.result import Cell, Options, Result
from kvshare_store.cli.progress import progress
from kvshare_store.config import StoreConfig, load_config
from kvshare_store.simulate.prompt_replay import (
    PREFIX_CACHING,
    Room,
    arms_of,
    replay,
)
from kvshare_store.simulate.prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES = ("exact", "faithful", "balanced", "aggressive")
SETTLED = 30.0
"""Seconds after which an edited prompt is exact in the columns that say so."""
ROW_BYTES = 57_344
CONVERSATIONS, TURNS = {"tau": 40, "ShareGPT": 250}, 6
"""Of the other traces; of each conversation so many turns."""
SHORT = 40
"""Requests of each slice in the short form."""
MEMORY = {"all": math.inf, "4": 4.0, "2": 2.0, "1": 1.0}
"""What each arm may keep, as a multiple of the longest prompt with its answer."""
_BOUNDED = ("chat", *CONVERSATIONS)
"""Traces that are replayed with bounded memory too."""


class Slice(NamedTuple):
    """Some sessions of a trace, with the prompts rendered in one way."""

    prompts: str
    sessions: str
    requests: list[Prompt]


class Key(NamedTuple):
    """One replay of one arm."""

    arm: str
    prompts: str
    memory: str
    sessions: str


class Left(NamedTuple):
    """What one arm left to compute of a slice."""

    tokens: int
    shares: list[float]
    """Of the tokens of all prompts, by kind of reuse, in percent."""
    ratio: float
    """To what prefix caching leaves; `settled`: where edited prompts become exact."""
    settled: float


def measure(options: Options) -> Result:
    """Every policy over each trace, with all memory and with little, and over each half of the
    agents' sessions apart."""
    config = load_config()
    slices = list(_slices(options))
    replays = [(each, memory) for each in slices for memory in _memories(each)]
    found: dict[Key, Left] = {}
    with progress() as shown:
        total = 2 * sum(len(each.requests) for each, _ in replays)
        task = shown.add_task("replay", total=total)
        for each, memory in replays:
            found |= replayed(each, memory, config, lambda: shown.advance(task))
    whole = {each.prompts: each.requests for each in slices if each.sessions == "all"}
    return Result(
        name="agents",
        title="Tokens left to compute of recorded requests, prefix caching = 1",
        n={
            f"requests ({name})": len(requests)
            for name, requests in whole.items()
            if name != "chat"
        },
        seed=0,
        model=f"none (tokens of {model_name(options)})",
        noise_floor="none: a replay gives the same numbers each time",
        columns=_COLUMNS,
        rows=rows_of(found),
        notes=_NOTES,
        targets=targets_of(found),
    )


_COLUMNS = [
    "policy", "prompts", "memory", "tokens left", "exact, %", "continued, %", "edited, %", "all",
    "all, settled", "dev", "dev, settled", "report", "report, settled",
]  # fmt: skip
_NOTES = [
    "`kvshare simulate --prompts` on each slice: the planner itself over nodes without rows, beside"
    " a model of vLLM's prefix cache (full blocks of 16 tokens, of prompts and answers). Prompts of"
    " fewer than `min_prompt_tokens` tokens do not count.",
    "`memory`: what each arm may keep, as a multiple of the longest prompt of the trace with its "
    "answer, the same for prefix caching; `all`: everything.",
    "`all`, `dev`, `report`: tokens left ÷ those of prefix caching, over all sessions and over "
    "every other one by its id, each half replayed alone. Settings are chosen on `dev`. "
    f"`settled`: edited prompts are exact after {SETTLED:.0f} s.",
    "Requests follow one another in the order of time over all sessions.",
    "`recorded`, `chat`: agents (magagent). `recorded`: prompts as the text that was recorded. No "
    "later prompt goes on from an answer there, since what opens it in the prompt was not recorded."
    " `chat`: the messages of that text in the model's chat template, as a server renders them.",
    f"`tau`: {CONVERSATIONS['tau']} support conversations; `ShareGPT`: {CONVERSATIONS['ShareGPT']} "
    f"conversations, of which only the person's words are recorded. The first {TURNS} turns of "
    "each; every turn sends the whole history. A conversation begins every 5 s, and a turn follows "
    "30 s after the one before.",
]


def _slices(options: Options) -> Iterator[Slice]:
    agents_ = agents.recorded(options.data)
    folder, tokenizer = model_folder(options), tokenizer_of(options)
    halves = agents.halves(agents_)
    texts = {
        "recorded": agents.as_recorded(agents_),
        "chat": agents.as_chat(agents_, tokenizer),
    }
    for rendering, pairs in texts.items():
        prompts = agents.prompts_of(agents_, pairs, folder)
        for name, sessions in {"all": halves["dev"] | halves["report"], **halves}.items():
            part = [each for each in prompts if each.session in sessions]
            yield Slice(rendering, name, _some(part, options))
    for name, of in (("tau", supported), ("ShareGPT", talked)):
        sessions_ = of(options.data, CONVERSATIONS[name], TURNS)
        yield Slice(name, "all", _some(side_by_side(sessions_, tokenizer), options))


def _some(prompts: list[Prompt], options: Options) -> list[Prompt]:
    return prompts[:SHORT] if options.short else prompts


def _memories(part: Slice) -> Iterable[str]:
    bounded = part.sessions == "all" and part.prompts in _BOUNDED
    return MEMORY if bounded else ["all"]


def room_of(requests: Iterable[Prompt], memory: str, settle: float | None = None) -> Room:
    """What each arm may keep of a trace."""
    longest = max(len(each.computed) for each in requests)
    return Room(ROW_BYTES, MEMORY[memory] * longest * ROW_BYTES, settle)


def replayed(
    part: Slice, memory: str, config: StoreConfig, served: Callable[[], None]
) -> dict[Key, Left]:
    """What each arm leaves."""
    plain, settled = (
        replay(
            part.requests,
            arms_of(config, POLICIES, room_of(part.requests, memory, settle)),
            config.min_prompt_tokens,
            served,
        )
        for settle in (None, SETTLED)
    )
    first = sum(plain.to_compute(PREFIX_CACHING))
    found = {}
    for name, reused in plain.reused.items():
        left = sum(plain.to_compute(name))
        kinds = [sum(tokens) for tokens in zip(*reused, strict=True)]
        shares = [100 * tokens / sum(plain.lengths) for tokens in kinds]
        ratios = left / first, sum(settled.to_compute(name)) / first
        found[Key(name, part.prompts, memory, part.sessions)] = Left(left, shares, *ratios)
    return found


def rows_of(found: dict[Key, Left]) -> list[list[Cell]]:
    """A row for each arm over all sessions of a trace; what was not replayed is empty."""
    rows: list[list[Cell]] = []
    for key, left in found.items():
        if key.sessions != "all":
            continue
        row: list[Cell] = [key.arm.replace("_", " "), *key[1:3], left.tokens, *left.shares]
        for sessions in ("all", "dev", "report"):
            part = found.get(key._replace(sessions=sessions))
            row += [None, None] if part is None else [part.ratio, part.settled]
        rows.append(row)
    return rows


def targets_of(found: dict[Key, Left]) -> list[tuple[str, str, bool]]:
    """The third is about every replay, settled or not."""
    ours = found[Key("balanced", "recorded", "all", "report")]
    worst = max(found, key=lambda each: max(found[each].ratio, found[each].settled))
    most = max(found[worst].ratio, found[worst].settled)
    return [
        (
            "balanced leaves at most 0.45 of prefix caching's tokens",
            f"{ours.ratio:.2f}",
            ours.ratio <= 0.45,
        ),
        ("settled, at most 0.25", f"{ours.settled:.2f}", ours.settled <= 0.25),
        (
            "no policy leaves more than prefix caching, on any trace, with any memory",
            f"at most {most:.4f} ({', '.join(worst)})",
            most <= 1.0,
        ),
    ]


def draw(result: Result) -> Figure:
    """Tokens left as a multiple of prefix caching, a panel for each trace, a line for each bound on
    memory."""
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(str(row[1]) for row in result.rows))
    figure = Figure(figsize=(3.2 * len(traces), 3.6))
    panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    at = _COLUMNS.index("all")
    for axes, trace in zip(panels, traces, strict=True):
        for (line, marker), memory in zip(LINES, MEMORY, strict=False):
            rows = [row for row in result.rows if row[1:3] == [trace, memory]]
            axes.plot(
                [str(row[0]) for row in rows], [float(row[at] or 0) for row in rows], line,
                marker=marker, markersize=4, color="black", linewidth=1, label=memory,
            )  # fmt: skip
        axes.set_title(trace)
        axes.tick_params(axis="x", rotation=30, labelsize=7)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("tokens left ÷ prefix caching")
    panels[1 % len(panels)].legend(title="memory ÷ longest prompt", fontsize=7)
    return figure
