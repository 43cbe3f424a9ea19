"""Think times: whether the next turn of a conversation finds an exact history.

The system prompt of each conversation has a time in it, so its first turn is served on edited rows
of an earlier conversation. While its user thinks, the engine may compute that again in full.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import islice, pairwise
from statistics import median
from typing import Any, NamedTuple

from benchmarks.data.chat_histories import as_tokens, conversations
from benchmarks.harness.engines import LONGEST, Arm, Engine, Home, Timed, rest, running
from benchmarks.harness.models import model_name, tokenizer_of
from benchmarks.harness.result import Cell, Options, Result
from examples.prompts.histories import REWRITES, Message, turns
from kvshare_store.cli.progress import track

_ARMS = {
    name: Arm(caching=True, kvshare=True, own={"second_look": name}) for name in ("off", "idle")
}
_THINK_S = (1.0, 5.0, 30.0)
_ANSWER = 32
_APART_S = 600
"""Between the times that two system prompts have."""
_BLOCK = 32
"""Of the engines (`examples.engines.engine.SETTINGS`)."""
_DATED = next(rewrite for rewrite in REWRITES if rewrite.name == "a date in the system prompt")


class Turn(NamedTuple):
    """A later turn of a conversation; tokens."""

    history: int
    """What was there before: the prompt and the answer of the turn before."""
    timed: Timed

    @property
    def exact(self) -> bool:
        """Whether nothing of the history was approximate or computed again, but for the last rows
        that fill no block, and the one of the last token, which is never stored."""
        report = self.timed.report
        approximate = report.get("kvshare.continued", 0) + report.get("kvshare.edited", 0)
        return not approximate and self.again <= 2 * _BLOCK

    @property
    def again(self) -> int:
        """Tokens of the history that were computed."""
        return max(0, self.timed.computed - (self.timed.tokens - self.history))


Spoken = list[list[int]]
"""What one side says in a conversation, turn by turn: the first prompt, then what follows each
answer."""


def measure(options: Options) -> Result:
    """Conversations side by side, once without second looks and once for each think time."""
    tokenizer = tokenizer_of(options)
    thinks = _THINK_S[:2] if options.short else _THINK_S
    count, most = options.size(6, 2), 3 if options.short else 4
    first, *spoken = [
        said(messages, at * _APART_S, tokenizer, most)
        for at, messages in enumerate(islice(conversations(options.data), count + 1))
    ]
    served: dict[float | None, list[Turn]] = {}
    with running(options, _ARMS, semantic="never", second_look_control=0.0) as (engines, home):
        for think in track((None, *thinks), "Think times"):
            engine = engines["off" if think is None else "idle"]
            salt = uuid.uuid4().hex
            home.clear()
            engine.forget()
            engine.ask(first[0], salt, max_tokens=_ANSWER)
            rest(engine, home)
            served[think] = serve(engine, home, spoken, salt, think or 0.0)
    return result_of(served, count, options, model_name(options))


def said(messages: Sequence[Message], second: int, tokenizer: Any, most: int) -> Spoken:
    """What a user and its tools say, with a time of the day in the system prompt."""
    histories = turns(messages)[:most]
    begin = as_tokens(_DATED.apply(histories[0], second), tokenizer)
    later = [history[len(before) + 1 :] for before, history in pairwise(histories)]
    return [begin, *(_after_answer(new, tokenizer) for new in later)]


def _after_answer(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """The end of an answer, what follows it, and the start of the next one."""
    ended: list[int] = tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return [*ended, *as_tokens(messages, tokenizer)]


def serve(
    engine: Engine, home: Home, spoken: Sequence[Spoken], salt: str, think_s: float
) -> list[Turn]:
    """All conversations: each turn of all of them, then their users think. Returns later turns."""
    so_far = [list[int]() for _ in spoken]
    found: list[Turn] = []
    for turn in range(max(map(len, spoken))):
        if turn and think_s:
            engine.idle(think_s)
        elif turn:
            rest(engine, home)
        for history, one in zip(so_far, spoken, strict=True):
            if turn >= len(one) or len(history) + len(one[turn]) + _ANSWER > LONGEST:
                continue
            timed = engine.ask([*history, *one[turn]], salt, max_tokens=_ANSWER)
            if turn:
                found.append(Turn(len(history), timed))
            history += [*one[turn], *timed.token_ids]
    return found


def result_of(
    served: dict[float | None, list[Turn]], count: int, options: Options, model: str
) -> Result:
    """A line for each think time."""
    lengths = sorted(turn.timed.tokens for turns_ in served.values() for turn in turns_)
    return Result(
        name="settled-turns",
        title="Later turns of conversations that find an exact history, by think time",
        n={"conversations": count, "later turns at each think time": len(served[None])},
        seed=options.seed,
        model=model,
        noise_floor="none: each conversation is served once at each think time; the first line is "
        "without second looks",
        columns=["think s", "second_look", "turns", "exact history", "computed", "history computed",
                 "p50 ms"],
        rows=[_row(think, turns_) for think, turns_ in served.items()],
        paper="not measured",
        notes=[
            f"prompts of {lengths[0]:,} to {lengths[-1]:,} tokens of recorded support "
            f"conversations; the model answers each with {_ANSWER} greedy tokens, which stay in "
            "the history",
            f"the system prompts have times {_APART_S // 60} minutes apart, so each first turn is "
            "served on edited rows; what follows goes on from it",
            f"{count} users think at once: all turns with one number are asked one after another, "
            "then the engine is idle for the think time, in which it also stores what it served",
            "exact history: no approximate rows, and of the history all but the last "
            f"{2 * _BLOCK} tokens was found in the store or in vLLM's own cache",
            "computed: share of all prompt tokens of later turns; history computed: share of the "
            "tokens that the turn before had",
            "without second looks nobody thinks: everything is stored before the next turn",
        ],
        series={
            "turns": [
                {"think_s": think, "history": turn.history, "tokens": turn.timed.tokens,
                 "computed": turn.timed.computed, "exact": turn.exact, "ttft_s": turn.timed.ttft_s}
                for think, turns_ in served.items() for turn in turns_
            ]
        },
    )  # fmt: skip


def _row(think: float | None, served: Sequence[Turn]) -> list[Cell]:
    tokens = sum(turn.timed.tokens for turn in served)
    history = sum(turn.history for turn in served)
    return [
        think,
        "off" if think is None else "idle",
        len(served),
        sum(turn.exact for turn in served) / len(served),
        sum(turn.timed.computed for turn in served) / tokens,
        sum(turn.again for turn in served) / history,
        round(1e3 * median(turn.timed.ttft_s for turn in served)),
    ]
