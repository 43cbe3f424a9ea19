"""Conversations whose first turn was edited: the next turns go on in the same context, from the
store or from the engine's own prefix cache; in this engine or in another one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from kvshare_store.daemon import protocol
from tests.engine.harness import BLOCK, TOLERANCE, Answer, Engine, Fresh
from tests.engine.other import Other
from tests.engine.test_faults import comes_back

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

ANSWER = 3
"""Rows of an answer that are stored: its last token has none."""
EXACT = 2 * BLOCK + 8
"""Exact rows of an edited prompt: its unchanged head, and the new line computed behind it."""
SETTINGS: dict[str, Any] = {"kvshare": {"policy": "aggressive"}, "enable_prefix_caching": True}
"""Not those of the shared engine: after a change of weights no other engine shares its rows."""


class Conversation:
    """A stored prompt, the same prompt with a line changed, and its next turns."""

    def __init__(self, engine: Engine, fresh: Fresh) -> None:
        head, old, rest = fresh(2 * BLOCK), fresh(8), fresh(6 * BLOCK)
        self.first = head + old + rest
        self.edited = head + fresh(8) + rest
        self.second = self.edited + fresh(BLOCK + 5)
        self.third = self.second + fresh(BLOCK + 7)
        engine.store(self.first)
        engine.forget()
        self.answer = engine.store(self.edited)
        assert self.answer.said["edited"] > 5 * BLOCK


@pytest.fixture(scope="module")
def other(kept: Engine) -> Iterator[Other]:
    """A second engine on the home of the first, and so on its daemon."""
    second = Other(kept.home, **SETTINGS)
    try:
        second.wait()
        yield second
    finally:
        second.close()


def kinds(answer: Answer) -> dict[str, int]:
    names = ("prefix_cached", "exact", "continued", "edited", "recomputed")
    return {name: answer.said[name] for name in names}


def test_the_next_turn_continues_from_the_store(engine: Engine, fresh: Fresh) -> None:
    talk = Conversation(engine, fresh)
    engine.forget()
    with engine.counted() as gained:
        answer = engine.store(talk.second)
    assert kinds(answer) == {
        "prefix_cached": 0,
        "exact": EXACT,
        "continued": len(talk.edited) - EXACT,
        "edited": 0,
        "recomputed": len(talk.second) - len(talk.edited),
    }
    assert (gained["hits_continued"], gained["hits_edited"]) == (1, 0)
    assert gained["tokens_reused_continued"] == answer.said["continued"]
    engine.forget()
    later = engine.ask(talk.third)
    assert later.said["continued"] == len(talk.second) - EXACT
    nodes = engine.client.call(protocol.ListNodes(100))
    (node,) = [node for node in nodes if node["tokens"] == len(talk.second) + ANSWER]
    assert (node["generation"], node["exact_rows"]) == (1, EXACT)


def test_the_next_turn_finds_what_is_still_in_the_engine(engine: Engine, fresh: Fresh) -> None:
    talk = Conversation(engine, fresh)
    from_engine = engine.store(talk.second)
    whole = len(talk.edited) // BLOCK * BLOCK
    assert from_engine.said["prefix_cached"] == whole
    assert from_engine.said["generation"] == 1, "vLLM's cache had approximate rows"
    # the rows of the last, half-filled block come from the store, if that is worth a load
    assert from_engine.said["edited"] == 0
    engine.forget()
    from_store = engine.ask(talk.second)
    assert (from_store.said["prefix_cached"], from_store.said["generation"]) == (0, 1)
    assert from_store.agrees(from_engine)


def test_what_the_engine_had_is_stored_as_what_it_is(engine: Engine, fresh: Fresh) -> None:
    """A turn that loads nothing still continues an edited prompt."""
    talk = Conversation(engine, fresh)
    engine.store(talk.second)
    from_engine = engine.store(talk.third)
    assert from_engine.said["prefix_cached"] >= len(talk.second) // BLOCK * BLOCK
    engine.forget()
    from_store = engine.ask(talk.third)
    assert from_store.said["continued"] > 0
    assert from_store.agrees(from_engine)
    engine.forget()
    plain = engine.ask(talk.third, policy="exact")
    assert (plain.said["exact"], plain.said["continued"]) == (EXACT, 0)


@pytest.mark.parametrize(
    "options", [{"policy": "exact"}, {"policy": "off"}, {"salt": "another tenant"}]
)
def test_nobody_else_finds_edited_blocks(
    engine: Engine, fresh: Fresh, options: dict[str, str]
) -> None:
    """Neither a request for exact rows, nor one without reuse, nor another tenant."""
    talk = Conversation(engine, fresh)
    engine.store(talk.second)
    answer = engine.ask(talk.second, **options)
    assert answer.said["prefix_cached"] <= 2 * BLOCK
    assert answer.said["continued"] == answer.said["edited"] == answer.said["generation"] == 0
    engine.forget()
    assert answer.agrees(engine.ask(talk.second, policy="off"))


def test_identical_edited_prompts_share_blocks(engine: Engine, fresh: Fresh) -> None:
    talk = Conversation(engine, fresh)
    again = engine.ask(talk.edited)
    assert again.said["prefix_cached"] >= (len(talk.edited) - 1) // BLOCK * BLOCK
    assert again.agrees(talk.answer)


def test_samples_of_one_edited_prompt_share_blocks(engine: Engine, fresh: Fresh) -> None:
    head, rest = fresh(2 * BLOCK), fresh(6 * BLOCK)
    engine.store(head + fresh(8) + rest)
    engine.forget()
    edited = head + fresh(8) + rest
    before = engine.stats()["tokens_engine_cached"]
    name = engine.add(edited, n=3, max_tokens=1, temperature=1.0, seed=7)
    first = [answer.logprobs[0] for answer in engine.drain()[name]]
    common = set.intersection(*(set(logprobs) for logprobs in first))
    assert common
    assert all(
        abs(other[token] - first[0][token]) < TOLERANCE for other in first for token in common
    )
    assert engine.stats()["tokens_engine_cached"] - before >= 2 * (len(edited) - 1) // BLOCK * BLOCK


def test_an_exact_prefix_in_the_engine_is_longer_than_the_stores(
    engine: Engine, fresh: Fresh
) -> None:
    """Continued rows then stand behind exact ones, which is another context than their own."""
    talk = Conversation(engine, fresh)
    engine.forget()
    exact = engine.ask(talk.edited[: 5 * BLOCK] + fresh(3), policy="off")  # in the engine alone
    assert exact.said["policy"] == "off"
    mixed = engine.store(talk.second)
    assert mixed.said["prefix_cached"] == 5 * BLOCK
    assert mixed.said["continued"] == len(talk.edited) - 5 * BLOCK
    again = engine.ask(talk.second)  # in the engine, under the mixed context
    assert again.said["prefix_cached"] == (len(talk.second) - 1) // BLOCK * BLOCK
    assert again.agrees(mixed)
    engine.forget()
    stored = engine.ask(talk.second)
    assert stored.said["exact"] == 5 * BLOCK
    assert stored.agrees(mixed)
    engine.forget()
    plain = engine.ask(talk.second, policy="off")
    assert plain.said["prefix_cached"] == 0


def test_a_conversation_sent_plainly_gets_full_computes_answers(
    engine: Engine, fresh: Fresh
) -> None:
    """After all edits and continuations, which the engine and the store still hold."""
    talk = Conversation(engine, fresh)
    reused = [talk.answer, engine.store(talk.second), engine.store(talk.third)]
    turns = [talk.edited, talk.second, talk.third]
    plain = [engine.ask(turn, policy="off") for turn in turns]
    engine.clear()
    for turn, edited, answer in zip(turns, reused, plain, strict=True):
        engine.forget()
        full = engine.ask(turn, policy="off")
        assert full.cached == 0
        assert answer.agrees(full)
        assert not edited.agrees(full), "approximate rows show in no answer of this test"


# --- another engine -------------------------------------------------------------------------------


def test_the_next_turn_goes_to_another_engine(engine: Engine, other: Other, fresh: Fresh) -> None:
    """Two engines on one daemon: each continues where the other stopped."""
    talk = Conversation(engine, fresh)
    served, _ = other.store(talk.second)
    assert kinds(served)["continued"] == len(talk.edited) - EXACT
    own = engine.ask(talk.second)
    assert own.said["prefix_cached"] == len(talk.edited) // BLOCK * BLOCK
    assert own.agrees(served)
    engine.forget()
    back = engine.store(talk.third)
    assert back.said["continued"] == len(talk.second) - EXACT
    again, _ = other.store(talk.third)
    assert again.said["prefix_cached"] == len(talk.second) // BLOCK * BLOCK
    assert again.agrees(back)


def test_the_next_turn_after_engine_and_daemon_were_started_again(
    engine: Engine, other: Other, fresh: Fresh
) -> None:
    """The engine that served the last turn was killed, and so was the daemon."""
    head, old, rest = fresh(2 * BLOCK), fresh(8), fresh(6 * BLOCK)
    first, edited = head + old + rest, head + fresh(8) + rest
    second = edited + fresh(BLOCK + 5)
    other.store(first)
    assert other.store(edited)[0].said["edited"] > 5 * BLOCK
    in_its_own_blocks, _ = other.store(second)
    assert in_its_own_blocks.said["prefix_cached"] == len(edited) // BLOCK * BLOCK
    other.close()
    os.kill(engine.daemon, signal.SIGKILL)
    comes_back(engine, first, 0)
    engine.forget()
    answer = engine.ask(second)
    assert answer.said["prefix_cached"] == 0
    assert answer.said["continued"] == len(second) - 1 - EXACT
    assert answer.agrees(in_its_own_blocks)
