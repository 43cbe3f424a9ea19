"""Repacking segments: the same rows in fewer blocks, and K still rotated for where it came from."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.node import Node, check_segments
from kvshare_store.nodes.repacking import merged_node, repacked, wants_merge
from kvshare_store.plan.spans import Span
from tests.support.block_names import block


def node(
    name: str,
    segments: list[Span],
    blocks: tuple[str, ...],
    *,
    parent: str | None = None,
    generation: int = 0,
    merged: bool = False,
) -> Node:
    length = segments[-1].stop
    return Node(
        id=name,
        namespace="n",
        token_bytes=np.arange(length, dtype=np.int32).tobytes(),
        parent=parent,
        segments=tuple(segments),
        blocks=tuple(map(block, blocks)),
        block_bytes=(100,) * len(blocks),
        exact_rows=0,
        generation=generation,
        merged=merged,
    )


@st.composite
def scattered(draw: st.DrawFn) -> list[Span]:
    """Segments of a node whose rows come from anywhere."""
    segments, at = [], 0
    for _ in range(draw(st.integers(1, 8))):
        length, block = draw(st.integers(1, 12)), draw(st.integers(0, 5))
        source, row = draw(st.integers(0, 50)), draw(st.integers(0, 4))
        segments.append(Span(at, length, source, block, row))
        at += length
    return segments


def sources(segments: list[Span] | tuple[Span, ...]) -> list[int]:
    """The position that each row was computed at."""
    return [segment.source + at for segment in segments for at in range(segment.length)]


@given(scattered(), st.integers(1, 9))
def test_each_row_keeps_its_source_and_blocks_are_full(segments: list[Span], size: int) -> None:
    length = segments[-1].stop
    packed = repacked(segments, size)
    check_segments(packed, length, -(-length // size))
    assert sources(packed) == sources(segments)
    places = [(s.block, s.row + at) for s in packed for at in range(s.length)]
    assert places == [divmod(at, size) for at in range(length)]


def test_what_was_one_run_is_one_segment() -> None:
    halves = [Span(0, 3, 7, 0, 2), Span(3, 5, 10, 1, 0), Span(8, 2, 0, 1, 6)]
    assert repacked(halves, 16) == (Span(0, 8, 7, 0, 0), Span(8, 2, 0, 0, 8))


def test_a_merged_node_is_the_same_prompt_with_the_same_provenance() -> None:
    old = node(
        "x", [Span(0, 5, 3, 1, 0), Span(5, 5, 5, 0, 0)], ("a", "b"), parent="p", generation=2
    )
    blocks = [block("c"), block("d")]
    new = merged_node(old, blocks, [8, 2], 8)
    assert new.merged
    assert new.blocks == tuple(blocks)
    for field in ("id", "parent", "edits", "generation", "exact_rows", "created", "token_bytes"):
        assert getattr(new, field) == getattr(old, field)


def chain_of(generations: list[int], merged: int | None = None) -> DeltaTree:
    """Nodes 0, 1, 2, …, each the child of the one before."""
    tree = DeltaTree()
    for at, generation in enumerate(generations):
        parent = str(at - 1) if at else None
        one = node(
            str(at),
            [Span(0, 8, 0, 0, 0)],
            (f"b{at}",),
            parent=parent,
            generation=generation,
            merged=at == merged,
        )
        tree.add(one)
    return tree


def wanted(tree: DeltaTree, name: str, chain: int, scatter: float = 4.0) -> bool:
    found = tree.get(name)
    assert found is not None
    return wants_merge(found, tree, 8, chain, scatter)


def test_chains_are_counted_in_edited_nodes() -> None:
    tree = chain_of([0, 0, 1, 2, 3])
    assert [tree.chain(str(at)) for at in range(5)] == [0, 0, 1, 2, 3]
    assert not wanted(tree, "4", 3)
    assert wanted(tree, "4", 2)
    assert not wanted(tree, "3", 2)


def test_a_chain_begins_anew_below_a_merged_node() -> None:
    tree = chain_of([0, 1, 2, 3, 4], merged=3)
    assert tree.chain("4") == 1
    assert not wanted(tree, "3", 0), "it is merged already"


def test_what_lies_in_too_many_blocks_is_merged_whatever_its_provenance() -> None:
    tree = DeltaTree()
    segments = [Span(2 * at, 2, 2 * at, at, 0) for at in range(8)]
    tree.add(node("x", segments, tuple("abcdefgh")))
    assert not wanted(tree, "x", 3, scatter=4.0)
    assert wanted(tree, "x", 3, scatter=3.9)


def test_a_loop_of_parents_ends() -> None:
    tree = DeltaTree()
    tree.add(node("a", [Span(0, 8, 0, 0, 0)], ("x",), parent="b", generation=1))
    tree.add(node("b", [Span(0, 8, 0, 0, 0)], ("y",), parent="a", generation=1))
    assert tree.chain("a") == 2
    assert [n.id for n in tree.path("a")] == ["b", "a"]


# --- who goes first -----------------------------------------------------------------------------


def order(tree: DeltaTree, namespace: str | None = None) -> list[str]:
    return [one.id for one in tree.victims(namespace)]


def test_pinned_nodes_are_in_no_order() -> None:
    tree = DeltaTree()
    for name in "ab":
        tree.add(node(name, [Span(0, 8, 0, 0, 0)], (name * 2,)))
    pinned = msgspec.structs.replace(tree.get("a"), pinned=True)  # type: ignore[type-var]
    tree.replace(pinned)
    tree.touch("a")
    assert order(tree) == order(tree, "n") == ["b"]
    assert tree.idle(-1.0) == ["b"]
    tree.replace(msgspec.structs.replace(pinned, pinned=False))
    assert set(order(tree)) == {"a", "b"}


def test_bytes_are_counted_once_a_block() -> None:
    tree = DeltaTree()
    tree.add(node("a", [Span(0, 8, 0, 0, 0)], ("x",)))
    tree.add(node("b", [Span(0, 8, 0, 0, 0), Span(8, 8, 8, 1, 0)], ("x", "y")))
    assert tree.bytes_of("n") == 200
    assert tree.namespaces() == ["n"]
    _, unused = tree.remove("a") or (None, None)
    assert unused == []
    assert tree.replace(node("b", [Span(0, 8, 0, 0, 0)], ("z",))) == [block("x"), block("y")]
    assert tree.bytes_of("n") == 100
    tree.remove("b")
    assert tree.bytes_of("n") == 0
    assert tree.namespaces() == []
    assert order(tree, "n") == []
