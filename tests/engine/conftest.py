"""Prompts for the engine tests: real text of the demo, as token ids."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's imports emit warnings that we cannot fix
    import vllm.v1.core.sched.scheduler
    import vllm.v1.worker.cpu_model_runner  # noqa: F401

from examples.engines.small_model import prepare_model
from examples.prompts.families import FAMILIES
from tests.engine.harness import Engine, Fresh, close_kept_engine, kept_engine


@pytest.fixture(scope="session", autouse=True)
def no_engine_outlives_the_tests() -> Iterator[None]:
    """Close the last engine that modules shared."""
    yield
    close_kept_engine()


@pytest.fixture(scope="module")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine for the module's SETTINGS."""
    return kept_engine(tmp_path_factory, **request.module.SETTINGS)


@pytest.fixture
def engine(kept: Engine) -> Iterator[Engine]:
    """That engine, with an empty store and an empty vLLM prefix cache. A test may leave no request,
    lease or block behind."""
    kept.clear()
    kept.steps.clear()
    yield kept
    kept.check_idle()


@pytest.fixture
def prompt(request: pytest.FixtureRequest, fresh: Fresh) -> list[int]:
    """A new prompt of the module's LENGTH."""
    return fresh(request.module.LENGTH)


@pytest.fixture(scope="session")
def encode() -> Callable[[str], list[int]]:
    """Text to token ids, in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(prepare_model()))

    def tokens(text: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        return list(
            tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        )

    return tokens


@pytest.fixture(scope="session")
def families(encode: Callable[[str], list[int]]) -> dict[str, list[list[int]]]:
    """Donor and followers of each demo family, as token ids."""
    return {
        family.name: [encode(family.donor), *(encode(text) for text in family.followers)]
        for family in FAMILIES
    }


@pytest.fixture(scope="session")
def fresh(families: dict[str, list[list[int]]]) -> Fresh:
    """Prompts of a given length that have no run of tokens in common with any given before.

    Real text always has some: the tokens of the families come in random order, each once and then
    again, so that two that stand in the same place are hardly ever equal. No two prompts start with
    the same token, which would be a common prefix.
    """
    shuffled = random.Random(0)
    tokens = sorted({token for texts in families.values() for token in texts[0]})
    begun: set[int] = set()

    def endless() -> Iterator[int]:
        while True:
            shuffled.shuffle(tokens)
            yield from tokens

    text = endless()

    def take(length: int) -> list[int]:
        first = next(token for token in text if token not in begun)
        begun.add(first)
        return [first, *itertools.islice(text, length - 1)]

    return take
