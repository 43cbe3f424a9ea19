"""Recorded requests of agents, replayed: tokens left to compute, beside prefix caching alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.data import agents
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
SETTLED = 10.0
"""Seconds after which an edited prompt is exact in the last column."""
ROW_BYTES = 57_344


class Slice(NamedTuple):
    """Some sessions of the trace, with the prompts rendered in one way."""

    rendering: str
    sessions: str
    requests: list[Prompt]


class Left(NamedTuple):
    """What one arm left to compute of a slice."""

    tokens: int
    shares: list[float]
    """Of the tokens of all prompts, by kind of reuse, in percent."""
    ratio: float
    """To what prefix caching leaves; `settled`: where edited prompts become exact."""
    settled: float


def measure(options: Options) -> Result:
    """Every policy over each half of the sessions apart, and over all of them."""
    config = load_config()
    recorded = agents.recorded(options.data)
    slices = list(_slices(options, recorded))
    found: dict[tuple[str, str, str], Left] = {}
    with progress() as shown:
        task = shown.add_task("replay", total=2 * sum(len(each.requests) for each in slices))
        for each in slices:
            for name, left in _replayed(each, config, lambda: shown.advance(task)).items():
                found[name, each.rendering, each.sessions] = left
    return Result(
        name="agents",
        title="Tokens left to compute of recorded requests of agents, prefix caching = 1",
        n={"requests": len(recorded), "sessions": len({each.session for each in recorded})},
        seed=0,
        model=f"none (tokens of {model_name(options)})",
        noise_floor="none: a replay gives the same numbers each time",
        columns=_COLUMNS,
        rows=_rows(found),
        notes=_NOTES,
        targets=_targets(found),
    )


_COLUMNS = [
    "policy", "prompts", "tokens left", "exact, %", "continued, %", "edited, %", "all", "dev",
    "report", "report, settled",
]  # fmt: skip
_NOTES = [
    "`kvshare simulate --prompts` on each slice: the planner itself over nodes without rows, beside"
    " a model of vLLM's prefix cache (full blocks of 16 tokens, of prompts and answers). Both keep "
    "everything. Prompts of fewer than `min_prompt_tokens` tokens do not count.",
    "`all`, `dev`, `report`: tokens left ÷ those of prefix caching, over all sessions and over "
    "every other one by its id, each half replayed alone. Settings are chosen on `dev`. "
    f"`settled`: edited prompts are exact after {SETTLED:.0f} s.",
    "Requests follow one another in the order of time over all sessions.",
    "`recorded`: prompts as the text that was recorded. No later prompt goes on from an answer "
    "there, since what opens it in the prompt was not recorded. `chat`: the messages of that text "
    "in the model's chat template, as a server renders them.",
]


def _slices(options: Options, recorded: Sequence[agents.Recorded]) -> Iterator[Slice]:
    folder = model_folder(options)
    halves = agents.halves(recorded)
    texts = {
        "recorded": agents.as_recorded(recorded),
        "chat": agents.as_chat(recorded, tokenizer_of(options)),
    }
    for rendering, pairs in texts.items():
        prompts = agents.prompts_of(recorded, pairs, folder)
        for name, sessions in {"all": halves["dev"] | halves["report"], **halves}.items():
            yield Slice(rendering, name, [each for each in prompts if each.session in sessions])


def _replayed(part: Slice, config: StoreConfig, served: Callable[[], None]) -> dict[str, Left]:
    """What each arm leaves."""
    plain, settled = (
        replay(
            part.requests,
            arms_of(config, POLICIES, Room(ROW_BYTES, settle=settle)),
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
        found[name] = Left(left, shares, left / first, sum(settled.to_compute(name)) / first)
    return found


def _rows(found: dict[tuple[str, str, str], Left]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for (name, rendering, sessions), left in found.items():
        if sessions == "all":
            halves = [found[name, rendering, half] for half in ("dev", "report")]
            ratios = [each.ratio for each in (left, *halves)]
            row = [name.replace("_", " "), rendering, left.tokens, *left.shares, *ratios]
            rows.append([*row, halves[-1].settled])
    return rows


def _targets(found: dict[tuple[str, str, str], Left]) -> list[tuple[str, str, bool]]:
    ours = found["balanced", "recorded", "report"]
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
            "no policy leaves more than prefix caching, on any slice",
            f"at most {most:.2f} ({', '.join(worst)})",
            most <= 1.0,
        ),
    ]


def draw(result: Result) -> Figure:
    """Tokens left as a multiple of prefix caching, a panel for each way to render prompts."""
    from matplotlib.figure import Figure

    renderings = list(dict.fromkeys(str(row[1]) for row in result.rows))
    figure = Figure(figsize=(9, 3.6))
    panels = figure.subplots(1, len(renderings), sharey=True)
    for axes, rendering in zip(panels, renderings, strict=True):
        rows = [row for row in result.rows if row[1] == rendering]
        for (line, marker), at in zip(LINES, range(6, len(result.columns)), strict=False):
            axes.plot(
                [str(row[0]) for row in rows], [float(row[at] or 0) for row in rows], line,
                marker=marker, markersize=4, color="black", linewidth=1, label=result.columns[at],
            )  # fmt: skip
        axes.set_title(f"prompts as {rendering}")
        axes.tick_params(axis="x", rotation=20)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("tokens left ÷ prefix caching")
    panels[0].legend(fontsize=7)
    return figure
