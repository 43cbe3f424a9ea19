"""Conversations whose histories are sent as they are, where prefix caching is at its best.

Each arm serves three conversations, turn about, without a pause; then the next arm does. Once all
conversations have one tenant and so a system prompt in common, once each has a tenant of its own
and nothing is shared but its own turns.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.harness.engines import LONGEST, Arm, Engine, Home, Timed, in_turn, rest, running
from benchmarks.harness.models import model_name, tokenizer_of
from benchmarks.harness.result import Options, Result
from benchmarks.harness.spread import median_and_middle_half
from benchmarks.harness.turns import ANSWER, SIDE_BY_SIDE, Turn, target_of, times_of
from examples.prompts.histories import REWRITES, Message, requests
from kvshare_store.cli.progress import track

_ARMS = {
    "prefix": Arm(caching=True),
    "prefix again": Arm(caching=True),
    "kvshare": Arm(caching=True, kvshare=True),
}
_TURNS = 6
_TOGETHER, _APART = "one tenant", "a tenant each"
_MOST = {_TOGETHER: 0.64, _APART: 1.03}
"""Targets: KVShare's time as a multiple of prefix caching's, median."""


class Asked(NamedTuple):
    """A request of a conversation."""

    conversation: int
    turn: int
    """From 1."""
    tokens: list[int]


def measure(options: Options) -> Result:
    """Serve all conversations, with tenants in common and apart; `--n`: how often."""
    tokenizer = tokenizer_of(options)

    def tokens_of(messages: Sequence[Message]) -> list[int]:
        return as_tokens(messages, tokenizer)[-LONGEST + ANSWER :]

    chosen = list(islice(conversations(options.data), 2 if options.short else 6))
    groups = [chosen[at : at + SIDE_BY_SIDE] for at in range(0, len(chosen), SIDE_BY_SIDE)]
    asked = [
        [Asked(one.conversation, one.turn, tokens_of(one.messages))
         for one in requests(group, REWRITES[0], 3 if options.short else _TURNS)]
        for group in groups
    ]  # fmt: skip
    parts = [(kind, at) for _ in range(options.size(2, 1)) for kind in _MOST for at in asked]
    served: list[Turn] = []
    with running(options, _ARMS) as (engines, home):
        for at, (kind, group) in enumerate(track(parts, "Conversations")):
            served += serve(engines, home, kind, group, at)
    return result_of(served, options, model_name(options))


def serve(
    engines: Mapping[str, Engine], home: Home, kind: str, asked: Sequence[Asked], part: int
) -> list[Turn]:
    """What each engine takes for the same requests, with tenants that nobody had before: nothing is
    left of the parts before."""
    timed: dict[str, list[Timed]] = {}
    salt_of = _salts(kind)
    for arm in in_turn(list(engines), part):
        engine = engines[arm]
        timed[arm] = [
            engine.ask(one.tokens, salt_of(one.conversation), max_tokens=ANSWER) for one in asked
        ]
        if arm == "kvshare":  # what is still to be stored must not slow the next arm down
            rest(engine, home)
    return [
        Turn(kind, one.turn, {arm: timed[arm][at] for arm in engines})
        for at, one in enumerate(asked)
    ]


def _salts(kind: str) -> Callable[[int], str]:
    salt = uuid.uuid4().hex
    return lambda conversation: salt if kind == _TOGETHER else f"{salt}{conversation}"


# --- the result -----------------------------------------------------------------------------------


def result_of(served: list[Turn], options: Options, model: str) -> Result:
    """The table; first turns are left out, since no history precedes them."""
    later = [turn for turn in served if turn.number > 1]
    of_kind = {kind: [turn for turn in later if turn.kind == kind] for kind in _MOST}
    middle, half = median_and_middle_half([turn.ratio("prefix again") for turn in later], 2)
    return Result(
        name="unchanged",
        title="Conversations as they are, turns 2 and later: time to first token",
        n={"turns of each kind": len(later) // len(of_kind)},
        seed=options.seed,
        model=model,
        noise_floor=f"a second engine with prefix caching: median {middle}, middle half {half}",
        columns=["conversations have", "arm", "ms", "times prefix caching", "middle half", "sum",
                 "computed"],
        rows=[[kind, arm, *times_of(arm, turns)] for kind, turns in of_kind.items()
              for arm in _ARMS],
        notes=[
            f"{SIDE_BY_SIDE} conversations take turns and are sent without a pause; {ANSWER} "
            "greedy tokens are generated for each; the recorded answers are the history",
            "sum: seconds of all turns, times prefix caching's. computed: tokens of the prompts "
            "that were computed, all turns",
        ],
        targets=[target_of(kind, most, of_kind[kind]) for kind, most in _MOST.items()],
    )  # fmt: skip
