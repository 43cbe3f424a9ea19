"""Exact nodes give up their ends first."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvshare_store.errors import PlanError
from kvshare_store.nodes.node import Node, check_node, node_id
from kvshare_store.nodes.packed import Names
from kvshare_store.nodes.state import NodeState
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan.spans import Span
from tests.support.block_names import block

_ROWS = 8
"""Of a block."""
_BYTES = 10
"""Of a row."""


def node(blocks: str, start: int = 0, *, exact: bool = True) -> Node:
    """A prompt whose rows lie in blocks with these letters; `start`: its first token."""
    length = _ROWS * len(blocks)
    tokens = np.arange(start, start + length, dtype=np.int32)
    return Node(
        id=node_id("n", tokens, exact),
        namespace="n",
        token_bytes=tokens.tobytes(),
        segments=[Span(_ROWS * at, _ROWS, _ROWS * at, at, 0) for at in range(len(blocks))],
        blocks=tuple(map(block, blocks)),
        block_bytes=(_ROWS * _BYTES,) * len(blocks),
        exact_rows=length if exact else 0,
        generation=int(not exact),
    )


def state_of(*nodes: Node) -> NodeState:
    state = NodeState(_ROWS)
    for each in nodes:
        state.insert(each, Vectors(lexical_vector(each.tokens), None))
    return state


def test_as_much_goes_as_must_and_from_the_end() -> None:
    whole = node("abcd")
    state = state_of(whole)
    change, shorter = state.shorten(whole, _ROWS * _BYTES + 1, least=1)
    assert change.nodes == (whole,)
    assert sorted(change.unused) == [block("c"), block("d")]
    assert shorter is not None
    check_node(shorter, _BYTES)
    assert shorter.tokens.tolist() == whole.tokens[:16].tolist()
    assert [each.id for each in state.tree] == [shorter.id]
    index = state.index("n")
    assert index is not None
    assert len(index) == 1


@pytest.mark.parametrize(("answer_from", "known"), [(10, 10), (16, 0), (20, 0)])
def test_what_is_left_of_an_answer_is_one(answer_from: int, known: int) -> None:
    whole = msgspec.structs.replace(node("abcd"), prompt_tokens=answer_from)
    _, shorter = state_of(whole).shorten(whole, _ROWS * _BYTES + 1, least=1)
    assert shorter is not None
    assert (shorter.length, shorter.prompt_tokens) == (16, known)


def test_an_answer_ends_with_its_node() -> None:
    for wrong in (-1, 33):
        with pytest.raises(PlanError, match="tokens of a prompt"):
            check_node(msgspec.structs.replace(node("abcd"), prompt_tokens=wrong), _BYTES)


def test_it_stays_the_next_to_go() -> None:
    first, second = node("abc"), node("xyz", start=100)
    state = state_of(first, second)
    _, shorter = state.shorten(first, 1, least=1)
    assert shorter is not None
    assert list(state.tree.victims()) == list(state.tree.victims("n")) == [shorter, second]


def test_it_goes_no_sooner_than_before() -> None:
    """A namespace over its quota shortens its own nodes: they are used later than others."""
    older, whole, newer = node("abc"), node("xyz", start=100), node("uvw", start=200)
    state = state_of(older, whole, newer)
    _, shorter = state.shorten(whole, 1, least=1)
    assert shorter is not None
    assert list(state.tree) == [older, shorter, newer]
    state.insert(whole, Vectors(lexical_vector(whole.tokens), None))
    assert list(state.tree) == [older, shorter, newer, whole], "it is saved again"
    state.tree.touch(shorter.id)
    state.remove([whole.id])
    assert list(state.tree) == list(state.tree.victims("n")) == [older, newer, shorter]


def test_rows_that_others_have_too_are_left_to_them() -> None:
    """An earlier turn of a conversation, of whose own rows only the answer is left."""
    later, turn = node("abxy"), node("abc")
    state = state_of(turn, later)
    assert state.shorten(turn, 1, least=1)[1] is None
    assert list(state.tree) == [later]


def test_many_blocks_are_unpacked_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is held: what took as many steps as blocks for each block took a second."""
    letters = "".join(map(chr, range(33, 113)))
    whole, turn = node(letters), node(letters[:-1])
    state = state_of(whole)
    seen: list[Names] = []
    unpacked = Names.unpacked
    monkeypatch.setattr(Names, "unpacked", lambda names: (seen.append(names), unpacked(names))[1])
    state.insert(turn, Vectors(lexical_vector(turn.tokens), None))
    assert state.shorten(turn, _ROWS * _BYTES, least=1)[1] is None
    assert state.shorten(whole, _ROWS * _BYTES, least=1)[1] is not None
    assert len(seen) < 20


def test_too_short_a_beginning_goes_too() -> None:
    whole = node("abcd")
    assert state_of(whole).shorten(whole, 1, least=25)[1] is None


def test_an_edited_node_goes_as_a_whole() -> None:
    edited = node("abcd", exact=False)
    state = state_of(edited)
    assert state.shorten(edited, 1, least=1)[1] is None
    assert not len(state.tree)


def test_a_beginning_that_is_there_is_not_made_twice() -> None:
    whole, there = node("abcd"), node("wxy")
    state = state_of(whole, there)
    assert state.shorten(whole, 1, least=1)[1] is None
    assert list(state.tree) == [there]
