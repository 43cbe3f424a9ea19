"""Time to first token of conversations in a real engine, beside vLLM's own prefix caching.

Each arm serves a few conversations, turn about, without a pause; then the next arm does. What an
engine stores and embeds meanwhile slows its next turns down as it does in production.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from textwrap import fill
from typing import TYPE_CHECKING, Any

from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.harness.engines import LONGEST, Arm, Engine, Home, Timed, in_turn, rest, running
from benchmarks.harness.models import model_name, tokenizer_of
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.harness.spread import median_and_middle_half
from benchmarks.harness.turns import ANSWER, SIDE_BY_SIDE, Turn, target_of, times_of
from benchmarks.peers import lmcache, semblend
from benchmarks.peers.environment import PeerMissingError, python_with
from examples.prompts.histories import REWRITES, Message, requests
from kvshare_store.cli.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "full": Arm(caching=False),
    "prefix": Arm(caching=True),
    "prefix again": Arm(caching=True),
    "kvshare": Arm(caching=True, kvshare=True),
}
_PEERS = ("lmcache", "semblend")
_OWN_ANSWER = 48
_OWN = "as it is, answered by the model"
_STORED_S = 1.0
"""Pause after a peer, which does not say when it has stored what it served."""
_MOST = {
    "as it is": 0.64,
    "a date in the system prompt": 0.13,
    "old tool results truncated": 0.7,
}
"""Targets: KVShare's time as a multiple of prefix caching's, median, by kind of history."""


def measure(options: Options) -> Result:
    """Serve all conversations with every arm, once for each way to rewrite the history."""
    tokenizer = tokenizer_of(options)
    turns = 5 if options.short else 6
    first = 2 if options.short else 0  # the third and fourth call tools from the second turn on
    chosen = list(islice(conversations(options.data), first, first + options.size(6, 2)))
    groups = [chosen[at : at + SIDE_BY_SIDE] for at in range(0, len(chosen), SIDE_BY_SIDE)]
    kinds = {rewrite.name: rewrite for rewrite in REWRITES} | {_OWN: REWRITES[0]}
    parts = [(kind, number) for kind in kinds for number in range(len(groups))]
    served: list[Turn] = []
    with others() as peers, running(options, ARMS | peers) as (engines, home):
        salt = ""
        for at, (kind, number) in enumerate(track(parts, "Conversations")):
            if number == 0:
                salt = uuid.uuid4().hex
                for engine in engines.values():
                    engine.forget()
            spoken = groups[number]
            if kind == _OWN:
                spoken = [answered(each, engines["full"], tokenizer, turns) for each in spoken]
            asked = [
                (one.turn, _prompt(one.messages, tokenizer))
                for one in requests(spoken, kinds[kind], turns)
            ]
            served += serve_turns(engines, home, kind, asked, salt, at)
    return result_of(served, options, model_name(options))


def answered(
    messages: Sequence[Message], engine: Engine, tokenizer: Any, turns: int
) -> list[Message]:
    """The conversation with the engine's answers in place of the first `turns` recorded ones."""
    own = list(messages)
    places = [at for at, one in enumerate(messages) if one["role"] == "assistant" and at]
    for at in places[:turns]:
        said = engine.ask(_prompt(own[:at], tokenizer), "", max_tokens=_OWN_ANSWER)
        own[at] = {**own[at], "content": said.text}
    return own


def _prompt(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    return as_tokens(messages, tokenizer)[-LONGEST + _OWN_ANSWER :]


@contextmanager
def others() -> Iterator[dict[str, Arm]]:
    """The arms of other systems that are installed, by name, with what they need running."""
    with ExitStack() as stack:
        arms = {}
        try:
            python = python_with("lmcache")
            log = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".log"))
            port = stack.enter_context(lmcache.server(python, log.file))
            arms["lmcache"] = Arm(True, more=lmcache.lmcache_settings(port), python=python)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="semblend-bench-"))
            python = python_with("semblend_vllm_connector")
            arms["semblend"] = Arm(True, more=semblend.semblend_settings(folder), python=python)
        except PeerMissingError as error:
            print(f"{error}; {len(arms)} of {len(_PEERS)} other systems take part")
        yield arms


def serve_turns(
    engines: Mapping[str, Engine], home: Home, kind: str,
    asked: Sequence[tuple[int, list[int]]], salt: str, part: int,
) -> list[Turn]:  # fmt: skip
    timed: dict[str, list[Timed]] = {}
    length = _OWN_ANSWER if kind == _OWN else ANSWER
    for arm in in_turn(list(engines), part):
        engine = engines[arm]
        own = "" if arm == "semblend" else salt  # with a salt it never finds what it stored
        timed[arm] = [engine.ask(prompt, own, max_tokens=length) for _, prompt in asked]
        # what is still to be stored must not slow the next arm down
        if arm == "kvshare":
            rest(engine, home)
        elif arm in _PEERS:
            time.sleep(_STORED_S)
    return [
        Turn(kind, turn, {arm: timed[arm][at] for arm in engines})
        for at, (turn, _) in enumerate(asked)
    ]


# --- the result -----------------------------------------------------------------------------------

_COLUMNS = [
    "history", "arm", "n", "ms", "times prefix caching", "middle half", "sum",
    "computed", "first token", "answer",
]  # fmt: skip


def result_of(served: list[Turn], options: Options, model: str) -> Result:
    later = [turn for turn in served if turn.number > 1]
    arms = list(served[0].timed)
    kinds = list(dict.fromkeys(turn.kind for turn in later))
    of_kind = {kind: [turn for turn in later if turn.kind == kind] for kind in kinds}
    middle, half = median_and_middle_half([turn.ratio("prefix again") for turn in later], 2)
    return Result(
        name="conversations",
        title="Conversations, turns 2 and later: time to first token, times prefix caching's",
        n={"turns of each kind": len(later) // len(kinds)},
        seed=options.seed,
        model=model,
        noise_floor=f"a second engine with prefix caching: median {middle}, middle half {half}",
        columns=_COLUMNS,
        rows=[_row(kind, arm, of_kind[kind]) for kind in kinds for arm in arms],
        paper="not measured",
        notes=notes_of(served, arms),
        targets=[target_of(f"history {kind}", most, of_kind[kind]) for kind, most in _MOST.items()],
    )  # fmt: skip


def notes_of(served: list[Turn], arms: list[str]) -> list[str]:
    tokens = sorted(turn.timed["full"].tokens for turn in served)
    missing = [name for name in _PEERS if name not in arms]
    notes = [
        f"prompts of {tokens[0]:,} to {tokens[-1]:,} tokens; {SIDE_BY_SIDE} conversations take "
        f"turns and are sent without a pause; {ANSWER} greedy tokens are generated for each",
        "the recorded answers are sent as history, whatever the model answers; in the last kind "
        f"the history has what full compute answered, up to {_OWN_ANSWER} tokens, and all answer "
        "as much",
        "the recordings have no thoughts: those of `thoughts stripped` are made of what was said, "
        "two rules of the system prompt and what follows; only the latest turn keeps its own",
        "sum: seconds of all turns, times prefix caching's. computed: tokens of the prompts that "
        "were computed, all turns. first token, answer: how many are those of full compute; "
        "prefix caching, whose rows are exact, is the floor of these columns",
        "all conversations of a kind have one tenant, so all arms may share what the "
        "conversations have in common",
        "LMCache and SemBlend have prefix caching on as KVShare has; how they are set up: "
        "`lmcache`, `semblend`. SemBlend has no tenants: it may find what another kind stored",
    ]
    return notes + ([f"not installed, so not measured: {', '.join(missing)}"] if missing else [])


def _row(kind: str, arm: str, turns: list[Turn]) -> list[Cell]:
    return [
        kind,
        arm,
        len(turns),
        *times_of(arm, turns),
        f"{sum(turn.same(arm, 1) for turn in turns)} of {len(turns)}",
        f"{sum(turn.same(arm) for turn in turns)} of {len(turns)}",
    ]


def draw(made: Result) -> Figure:
    """Median time to first token beside prefix caching's, by kind of history and arm."""
    from matplotlib.figure import Figure

    ratios = {(row[0], row[1]): float(str(row[4])) for row in made.rows}
    kinds = list(dict.fromkeys(kind for kind, _ in ratios))
    arms = [arm for arm in dict.fromkeys(arm for _, arm in ratios) if arm not in ("full", "prefix")]
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    greys = ("white", "black", "grey", "lightgrey")
    for place, (arm, grey) in enumerate(zip(arms, greys, strict=False)):
        at = [kind + (place - (len(arms) - 1) / 2) * 0.2 for kind in range(len(kinds))]
        middle = [ratios[kind, arm] for kind in kinds]
        axes.bar(at, middle, 0.2, color=grey, edgecolor="black", label=arm)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), [fill(kind, 16) for kind in kinds])
    axes.set_ylabel("time to first token, times prefix caching's")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
