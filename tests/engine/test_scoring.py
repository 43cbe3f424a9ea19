"""How good an answer was: what a look asks of the runner, and what it makes of that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kvshare_connectors.vllm.scoring import is_greedy, regrets_of
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.outputs import LogprobsTensors

from kvshare_store.daemon import protocol
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.plan.spans import Span
from kvshare_store.save.second_looks import Look
from tests.engine.schedulers import NAMESPACE, Bench, FakeLink, runs_of
from tests.engine.test_looking import CHUNK, check_gone, idle, run_out, short_pauses
from tests.engine.test_steps import link, make

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

__all__ = ["idle", "link", "make", "short_pauses"]

Idle = Callable[..., Bench]
PROMPT = list(range(500, 700))
BEGINS, SCORED = 160, 6
ROW = (BEGINS - 1, SCORED + 1)
"""Where the row begins that scores the answer, and its tokens."""


def said(*rows: tuple[float, float]) -> LogprobsTensors:
    """Of each token its own log probability, and that of the best one."""
    count = len(rows)
    return LogprobsTensors(
        torch.zeros(count, 2, dtype=torch.int32), torch.tensor(rows), torch.zeros(count)
    )


def give(
    bench: Bench,
    link: FakeLink,
    *,
    answer: int = BEGINS,
    score: int = SCORED,
    control: bool = False,
) -> None:
    space, tokens = bench.planning.namespace.digest, np.asarray(PROMPT, np.int32).tobytes()
    link.looks.append(Look("node", 7, space, tokens, answer, score, control))
    bench.probable = said(*[(-2.0, -1.5)] * SCORED)


def ended(link: FakeLink) -> tuple[str, tuple[float, ...]]:
    (look,) = [told for told in link.told if isinstance(told, protocol.Looked)]
    return look.end, look.regrets


def every_step(bench: Bench) -> list[Any]:
    """Step until the engine sleeps; what was scheduled."""
    outputs = []
    while bench.scheduler.has_requests():
        outputs.append(bench.step())
    return outputs


def steps(bench: Bench) -> list[Any]:
    """Of these the steps that had tokens."""
    return [output for output in every_step(bench) if output.total_num_scheduled_tokens]


# --- what is asked of the runner ------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
def test_the_last_step_computes_the_answers_first_tokens_once_more(
    idle: Idle, link: FakeLink, ahead: bool
) -> None:
    bench = idle(ahead=ahead)
    give(bench, link)
    every = every_step(bench)
    outputs = [output for output in every if output.total_num_scheduled_tokens]
    assert [bool(runs_of(output)) for output in outputs] == [False] * (len(outputs) - 1) + [True]
    ((_, *row),) = runs_of(outputs[-1])
    assert tuple(row) == ROW
    (new,) = outputs[-1].scheduled_new_reqs
    assert new.prompt_token_ids == PROMPT[: BEGINS + SCORED], "so the runner reports at once"
    assert new.sampling_params.prompt_logprobs == 1
    assert max(output.total_num_scheduled_tokens for output in outputs) <= CHUNK
    computed = sum(output.total_num_scheduled_tokens for output in outputs)
    assert computed == len(PROMPT) + SCORED + 1
    assert ended(link) == ("computed", (0.5,) * SCORED)
    assert not bench.answers, "frontends hear nothing of it"
    assert any(new.req_id in output.finished_req_ids for output in every), "the runner forgets it"
    check_gone(bench)


@pytest.mark.parametrize("tokens", range(1, 12))
def test_steps_stay_small_and_the_answer_is_scored_as_far_as_one_has_room(
    idle: Idle, link: FakeLink, tokens: int
) -> None:
    bench = idle(kvshare={"second_look_tokens": tokens})
    give(bench, link)
    outputs = steps(bench)
    assert max(output.total_num_scheduled_tokens for output in outputs) <= tokens
    assert len(outputs) <= math.ceil(len(PROMPT) / tokens) + 2, "two steps more at most"
    end, regrets = ended(link)
    assert (end, len(regrets)) == ("computed", max(0, min(SCORED, tokens - 2)))


def test_a_short_look_is_scored_in_its_only_step(idle: Idle, link: FakeLink) -> None:
    link.plan = _exact(len(PROMPT) - 10)
    bench = idle()
    give(bench, link)
    (output,) = steps(bench)
    assert output.total_num_scheduled_tokens == 10 + SCORED + 1
    assert len(ended(link)[1]) == SCORED


@pytest.mark.parametrize(
    ("answer", "score"), [(0, 0), (BEGINS, 0), (0, 5), (len(PROMPT) - 2, 5), (len(PROMPT), 1)]
)
def test_without_an_answer_there_is_no_score(
    idle: Idle, link: FakeLink, answer: int, score: int
) -> None:
    """As a daemon of the release before gives looks, or one that means something else."""
    bench = idle()
    give(bench, link, answer=answer, score=score)
    outputs = steps(bench)
    assert not any(runs_of(output) for output in outputs)
    assert sum(output.total_num_scheduled_tokens for output in outputs) == len(PROMPT)
    assert ended(link) == ("computed", ())


def test_without_a_free_row_there_is_no_score(idle: Idle, link: FakeLink) -> None:
    bench = idle(max_num_seqs=1)
    give(bench, link)
    assert not any(runs_of(output) for output in steps(bench))
    assert ended(link) == ("computed", ())


def test_a_runner_that_cannot_say_it_is_not_asked(idle: Idle, link: FakeLink) -> None:
    bench = idle()
    bench.planning.looks.scores = False  # type: ignore[union-attr]
    give(bench, link)
    assert not any(runs_of(output) for output in steps(bench))
    asked = [told for told in link.told if isinstance(told, protocol.NextLook)]
    assert not asked[-1].scores


def test_beside_requests_a_look_has_its_share_with_the_score(idle: Idle, link: FakeLink) -> None:
    bench = idle(kvshare={"second_look": 0.0625})
    request = bench.add(range(100), max_tokens=80)
    bench.step()
    give(bench, link)
    most = []
    while not request.is_finished():
        output = bench.step()
        scheduled = dict(output.num_scheduled_tokens)
        scheduled.pop(request.request_id, None)
        most.append(sum(scheduled.values()))
    assert max(most) <= 32
    assert ended(link) == ("computed", (0.5,) * SCORED)


def test_a_control_is_computed_from_its_first_token_and_not_stored(
    idle: Idle, link: FakeLink
) -> None:
    bench = idle()
    give(bench, link)
    run_out(bench)  # vLLM has its blocks now
    link.told.clear()
    asked, saves = len(link.asked), []
    give(bench, link, control=True)
    bench.planning.looks.disturbed()  # type: ignore[union-attr]
    for output in steps(bench):
        saves += output.kv_connector_metadata.saves
    assert len(link.asked) == asked, "nothing is looked up"
    assert not saves
    assert ended(link) == ("computed", (0.5,) * SCORED)
    check_gone(bench)


# --- what is made of it ---------------------------------------------------------------------------


def test_a_look_that_is_dropped_has_no_score(idle: Idle, link: FakeLink) -> None:
    bench = idle()
    give(bench, link)
    output = bench.schedule()
    while not runs_of(output):
        bench.finish(output)
        output = bench.schedule()
    bench.add(range(100))
    bench.finish(output)
    assert ended(link) == ("dropped", ())


def test_a_score_on_rows_that_could_not_be_loaded_does_not_count(
    idle: Idle, link: FakeLink
) -> None:
    link.plan = _exact(BEGINS)
    bench = idle()
    give(bench, link)
    output = bench.schedule()
    while not runs_of(output):
        bench.finish(output)
        output = bench.schedule()
    (spec,) = output.kv_connector_metadata.loads
    bench.probable = said(*[(-9.0, -1.0)] * SCORED)
    bench.finish(output, invalid={spec.block_ids[0]})
    bench.probable = said(*[(-2.0, -1.5)] * SCORED)
    run_out(bench)
    assert ended(link) == ("computed", (0.5,) * SCORED)


def test_regrets_are_those_of_the_last_tokens() -> None:
    """One runner reports the whole prompt, the other what it computed."""
    rows = [(-3.0, -1.0), (-0.5, -0.5), (-2.0, -1.75)]
    whole = said(*[(float("nan"), 0.0)] * 5, *rows)
    assert regrets_of(said(*rows), 3) == regrets_of(whole, 3) == (2.0, 0.0, 0.25)


def test_regrets_are_numbers_that_can_be_summed() -> None:
    assert regrets_of(said((-math.inf, -1.0), (-1.0, -1.0 - 1e-7)), 2) == (100.0, 0.0)
    assert regrets_of(said((math.nan, -1.0)), 1) == ()
    assert regrets_of(said((-math.inf, -math.inf)), 1) == ()
    assert regrets_of(said((-1.0, -1.0)), 2) == ()
    assert regrets_of(None, 1) == ()


@pytest.mark.parametrize(
    "wanted",
    [
        {"temperature": 0.7}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.2}, {"logit_bias": {5: 1.0}}, {"min_tokens": 3, "max_tokens": 9},
        {"allowed_token_ids": [5]}, {"bad_words": ["no"]}, {"thinking_token_budget": 0},
        {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
    ],
    ids=lambda wanted: next(iter(wanted)),
)  # fmt: skip
def test_answers_that_are_not_the_models_best_are_not_greedy(wanted: dict[str, Any]) -> None:
    assert not is_greedy(SamplingParams(**({"temperature": 0.0} | wanted)))


def test_greedy_answers_are_greedy() -> None:
    assert is_greedy(SamplingParams(temperature=0.0, max_tokens=4, stop=["end"], ignore_eos=True))
    assert not is_greedy(None)


def _exact(rows: int) -> ReusePlan:
    return ReusePlan(
        namespace=NAMESPACE.digest,
        tokens=len(PROMPT),
        exact=rows,
        spans=(Span(0, rows, 0, 0, 0, True),),
        blocks=(BlockRef("ab" * 32, 256, 4096, 0),),
        donors=("d",),
        lease="lease",
        saving_ms=10.0,
    )
