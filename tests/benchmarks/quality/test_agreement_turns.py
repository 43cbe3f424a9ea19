"""Agreement of conversations: who is compared with whom, and what the table says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kvshare_connectors.transformers.engine import RowEngine

from benchmarks.quality import agreement_turns
from benchmarks.quality.agreement_scores import Score
from benchmarks.quality.agreement_turns import FIRST, LATER, parts
from benchmarks.quality.served_turns import Request, Served, Serving, floor_of
from tests.transformers.tiny import prompt_of

KIND = agreement_turns.KINDS[1]


def served(conversation: int, turn: int, *, made: int = 1, kl: float = 0.01) -> Served:
    request = Request(KIND, conversation, turn, (1, 2))
    one = Score("balanced", request.id, 100, 50, True, 0.02, kl, 1.0)
    return Served(request, one, edited=9, generation=made)


def test_turns_are_parted_at_the_first_edit_of_their_conversation() -> None:
    turns = [
        served(0, 1, made=0), served(0, 2, made=1), served(0, 3, made=1),
        served(1, 1, made=1), served(1, 2, made=2), served(2, 1, made=0),
    ]  # fmt: skip
    parted = parts(turns)
    assert parted[FIRST] == [turns[1], turns[3]]
    assert parted[LATER] == [turns[2], turns[4]]
    assert parted["turn 2"] == [turns[4]]
    assert parted["turn 3"] == [turns[2]]


@pytest.mark.parametrize(
    ("later", "floor", "reached"),
    [
        ((0.010, 0.014), 0.0, True),
        ((0.020, 0.021), 0.0, False),
        ((0.020, 0.021), 0.012, True),
        ((0.020, 0.070), 0.012, True),
    ],
)
def test_later_turns_may_differ_by_noise(
    later: tuple[float, float], floor: float, reached: bool
) -> None:
    turns = [served(0, 1, kl=0.010), served(1, 1, kl=0.012)]
    turns += [served(0, 2, kl=later[0]), served(1, 2, kl=later[1])]
    ((_, _, verdict),) = agreement_turns.targets(KIND, parts(turns), floor)
    assert verdict is reached


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_each_turn_is_built_on_the_one_before_it(llama: RowEngine, stack: ExitStack) -> None:
    head, body = prompt_of(200)[:4], prompt_of(200)[10:90]
    prompts = [(*head, date, *body, *range(30, 30 + 8 * date)) for date in (1, 2, 3)]
    asked = [Request(KIND, 0, turn + 1, prompt) for turn, prompt in enumerate(prompts)]
    serving = Serving(llama, stack, {"laxest": {"policy": "aggressive", "min_prompt_tokens": 8}})
    assert serving.serve(asked[0]) == [], "it is exact"
    later = [one for request in asked[1:] for one in serving.serve(request)]
    assert [one.generation for one in later] == [1, 2]
    assert all(one.edited >= len(body) - 2 for one in later)
    assert all(one.score.kl > 1e-6 for one in later)


def test_the_floor_is_of_one_engine(llama: RowEngine) -> None:
    noise = floor_of(llama, Request(KIND, 0, 1, tuple(prompt_of(64))))
    assert 0 <= noise.kl < 1e-6
