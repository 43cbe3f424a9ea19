"""Scores in a real engine: how far served answers are from those of full compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from kvshare_store.daemon import protocol
from tests.engine.harness import BLOCK, Engine, kept_engine
from tests.engine.pictures import FOLDER, Pictures, pictures, settings, subject, tab
from tests.engine.test_second_look import (
    ANSWER,
    CHUNK,
    HEAD,
    LINE,
    REST,
    Fresh,
    begin_clean,
    rest,
    settle,
)
from tests.http.test_browser import text
from tests.support.browser import Tab
from tests.support.page import page_url

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

__all__ = ["pictures", "tab"]

ANSWERS = 150 if FOLDER else 8
"""Scored before the page is looked at."""
POLICIES = ("aggressive", "balanced", "faithful")
"""What each two prompts ask for in turn."""
NOISE = 1e-3
"""Nats between two computations of the same in float32."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return kept_engine(
        tmp_path_factory,
        kvshare=settings(
            {
                "policy": "aggressive",
                "second_look": "idle",
                "second_look_tokens": CHUNK,
                "second_look_control": 1.0,
                "http": "127.0.0.1:0",
            },
            policy="aggressive",
        ),
        enable_prefix_caching=True,
        disable_log_stats=False,
    )


@pytest.fixture(autouse=True)
def clean(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_clean(engine, monkeypatch)


def edited(engine: Engine, fresh: Fresh, **sampling: Any) -> tuple[list[int], list[int]]:
    """A prompt that was served with edited rows, and what is stored of its answer."""
    head, tail = fresh(HEAD), fresh(REST)
    engine.store([*head, *fresh(8), *tail], max_tokens=1)
    engine.forget()
    prompt = [*head, *LINE, *tail]
    answer = engine.ask(prompt, max_tokens=ANSWER, **sampling)
    assert answer.said["edited"] > 4 * BLOCK
    engine.settle()
    return prompt, answer.tokens[:-1]


def in_full(engine: Engine, prompt: list[int], answer: list[int]) -> list[float]:
    """The regret of each token of an answer, as vLLM itself reports it for a prompt."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    text: Any = {"prompt_token_ids": [*prompt, *answer]}
    (said,) = engine.llm.generate(text, wanted, use_tqdm=False)
    regrets = []
    for token, found in zip(answer, said.prompt_logprobs[len(prompt) :], strict=True):
        regrets.append(max(one.logprob for one in found.values()) - found[token].logprob)
    return regrets


def verdict(engine: Engine, tokens: list[int]) -> dict[str, Any]:
    """What `kvshare show` says of the node with these tokens."""
    engine.settle()
    (node,) = [n for n in engine.client.call(protocol.ListNodes()) if n["tokens"] == len(tokens)]
    found: dict[str, Any] = engine.client.call(protocol.ShowNode(node["id"]))
    assert found["verdict"] is not None
    return found["verdict"]


def spoil(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on rows that are loaded at other positions than they were computed for, or behind
    them, are noise."""
    worker = engine.worker
    load = worker.load_one

    def noisy(spec: Any) -> int:
        nbytes = load(spec)
        at = torch.arange(HEAD, spec.plan.stop)
        slots = torch.tensor(spec.block_ids)[at // BLOCK] * BLOCK + at % BLOCK
        worker.cache.write(torch.randn(worker.cache.layout.shape(len(at))) * 3, slots)
        return int(nbytes)

    monkeypatch.setattr(worker, "load_one", noisy)


def counted(policy: str) -> dict[str, float]:
    """What vLLM's own metrics say of the greedy answers served under a policy. (`LLM.get_metrics`
    rounds counters down.)"""
    found: Counter[str] = Counter()
    for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
        name = sample.name.removeprefix("vllm:kvshare_").removesuffix("_total")
        ours = name != sample.name and sample.name.endswith("_total")
        greedy = sample.labels.get("chosen", "greedy") == "greedy"
        if ours and greedy and sample.labels.get("policy") == policy and sample.labels["edit"]:
            found[name] += sample.value
    return dict(found)


def test_an_edited_prompts_answer_is_scored_as_full_compute_scores_it(
    engine: Engine, fresh: Fresh
) -> None:
    before = counted("aggressive")
    prompt, answer = edited(engine, fresh)
    settle(engine)
    found = verdict(engine, [*prompt, *answer])
    regrets = in_full(engine, prompt, answer)
    assert found["scored"] == len(answer) == ANSWER - 1
    assert found["regret"] == pytest.approx(sum(regrets) / len(regrets), abs=NOISE)
    assert found["worst"] == pytest.approx(max(regrets), abs=NOISE)
    assert (found["control"], found["greedy"], found["policy"]) == (False, True, "aggressive")
    first = next((at for at, regret in enumerate(regrets) if regret > NOISE), None)
    assert found["diverged"] == first
    assert found["settled"]
    gained = {name: value - before.get(name, 0) for name, value in counted("aggressive").items()}
    assert gained == {
        "scored_answers": 1,
        "scored_tokens": ANSWER - 1,
        "regret_nats": pytest.approx(found["regret"] * found["scored"], abs=NOISE),
        "diverged_answers": first is not None,
    }
    bound = [one.value for family in REGISTRY.collect() for one in family.samples
             if one.name == "vllm:kvshare_quality_bound"]  # fmt: skip
    assert bound == [0.0], "as the daemon has it"


def test_an_answer_that_was_spoiled_has_a_large_regret(
    engine: Engine, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(engine, patch)
        prompt, answer = edited(engine, fresh)
    settle(engine)
    found = verdict(engine, [*prompt, *answer])
    assert found["regret"] > 1
    assert found["diverged"] is not None
    regrets = in_full(engine, prompt, answer)
    assert found["regret"] == pytest.approx(sum(regrets) / len(regrets), abs=NOISE)


def test_a_control_is_computed_anew_and_has_no_regret(engine: Engine, fresh: Fresh) -> None:
    prompt = fresh(4 * BLOCK)
    answer = engine.store(prompt, max_tokens=ANSWER)
    before = len(engine.steps)
    settle(engine)
    computed = sum(step.tokens for step in engine.steps[before:])
    rows = len(prompt) + ANSWER - 1
    assert computed == rows + ANSWER, "all of it, and what is scored"
    found = verdict(engine, [*prompt, *answer.tokens[:-1]])
    assert (found["control"], found["scored"]) == (True, ANSWER - 1)
    assert found["worst"] < NOISE
    assert found["diverged"] is None
    assert found["floor"] == pytest.approx(0, abs=NOISE)
    assert engine.stats()["scores"]["control"]["greedy"]["answers"] >= 1


def test_what_was_not_greedy_is_scored_but_cannot_diverge(engine: Engine, fresh: Fresh) -> None:
    prompt, answer = edited(engine, fresh, temperature=1.0, seed=3)
    settle(engine)
    found = verdict(engine, [*prompt, *answer])
    assert (found["greedy"], found["diverged"]) == (False, None)
    assert found["scored"] == ANSWER - 1


def test_the_log_has_the_verdict_of_a_request(engine: Engine, fresh: Fresh) -> None:
    prompt, _ = edited(engine, fresh)
    settle(engine)
    logged = engine.client.call(protocol.ListRequests())
    (entry,) = [one for one in logged if one["tokens"] == len(prompt) and one["edited"]][:1]
    assert entry["verdict"]["scored"] == ANSWER - 1


def test_rows_that_the_score_computed_again_are_right(engine: Engine, fresh: Fresh) -> None:
    """They are written twice in one step, and are served afterwards."""
    prompt, answer = edited(engine, fresh)
    settle(engine)
    following = [*prompt, *answer, *fresh(8)]
    full = engine.ask(following, policy="off", skip_reading_prefix_cache=True)
    rest(engine)
    for policy in ("off", None):  # vLLM's own blocks of the look, then the store's
        served = engine.ask(following, policy=policy)
        assert served.agrees(full)
        rest(engine)
        engine.forget()


def test_the_page_shows_what_was_scored(
    engine: Engine, encode: Callable[[str], list[int]], tab: Tab, pictures: Pictures
) -> None:
    for at in range(ANSWERS):
        asked = POLICIES[at // 2 % len(POLICIES)]
        engine.store(encode(subject(at)), max_tokens=ANSWER, policy=asked)
        engine.forget()
        settle(engine)
    answers = {
        policy: sum(chosen["answers"] for chosen in scores.values())
        for policy, scores in engine.stats()["scores"].items()
    }
    controls = answers.pop("control")
    edited = sum(answers.values())
    assert edited >= ANSWERS // 3
    assert answers.keys() == set(POLICIES)
    tab.look(1280, 900)
    tab.open(page_url(engine.home) + "/quality")
    assert f"Edited answers scored\n{edited:,}" in text(tab)
    assert f"Controls\n{controls:,}" in text(tab)
    assert tab.complaints == []
    pictures.take(tab, "quality")
