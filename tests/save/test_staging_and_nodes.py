"""Staged saves: segments cover every position once, whatever was reused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.errors import PlanError
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.node import (
    Node,
    check_segments,
    decode_node,
    encode_node,
    node_id,
    segments_between,
)
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Run, Span, clip_spans, gaps
from kvshare_store.save.staging import (
    Reuse,
    check_reuse,
    exact_rows,
    fresh_segments,
    new_staged,
)
from tests.support.block_names import block


@st.composite
def reuses(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans over a prompt, in order and apart, and the prompt's length."""
    spans, at = [], 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 9))
        length = draw(st.integers(1, 9))
        spans.append(
            Span(
                at,
                length,
                draw(st.integers(0, 99)),
                draw(st.integers(0, 3)),
                0,
                draw(st.booleans()),
            )
        )
        at += length
    return spans, at + draw(st.integers(0, 9))


@given(reuses(), st.integers(0, 60), st.integers(0, 60))
def test_gaps_are_what_no_span_covers(reuse: tuple[list[Span], int], start: int, stop: int) -> None:
    spans, _ = reuse
    covered = {at for span in spans for at in range(span.start, span.stop)}
    found = [at for run in gaps(spans, start, stop) for at in range(run.start, run.stop)]
    assert found == [at for at in range(start, stop) if at not in covered]
    assert all(run.length > 0 for run in gaps(spans, start, stop))


@given(reuses(), st.integers(0, 60), st.integers(0, 60))
def test_clipping_keeps_where_rows_come_from(
    reuse: tuple[list[Span], int], start: int, stop: int
) -> None:
    def rows(spans: list[Span]) -> dict[int, tuple[int, int, int, bool]]:
        return {
            span.start + at: (span.block, span.row + at, span.source + at, span.exact)
            for span in spans
            for at in range(span.length)
        }

    expected = {at: row for at, row in rows(reuse[0]).items() if start <= at < stop}
    assert rows(clip_spans(reuse[0], start, stop)) == expected


@given(reuses(), st.integers(1, 8))
def test_fresh_and_reused_rows_make_up_the_prompt(
    reuse: tuple[list[Span], int], block_tokens: int
) -> None:
    spans, length = reuse
    staged = new_staged(spans, length, block_tokens)
    fresh = [at for run in staged.fresh for at in range(run.start, run.stop)]
    sizes = staged.sizes
    assert sum(sizes) == len(fresh)
    assert all(size == block_tokens for size in sizes[:-1])
    assert all(0 < size <= block_tokens for size in sizes)
    segments = fresh_segments(staged.fresh, sizes, 4)
    places = [(block, row) for block, size in enumerate(sizes, 4) for row in range(size)]
    found = [
        (segment.start + at, segment.source + at, (segment.block, segment.row + at))
        for segment in segments
        for at in range(segment.length)
    ]
    assert found == [(at, at, place) for at, place in zip(fresh, places, strict=True)]
    together = sorted([*spans, *segments], key=lambda segment: segment.start)
    check_segments(together, length, 4 + len(sizes))


@given(reuses())
def test_exact_rows_end_at_the_first_edited_one(reuse: tuple[list[Span], int]) -> None:
    spans, length = reuse
    edited = [at for span in spans if not span.exact for at in range(span.start, span.stop)]
    assert exact_rows(spans, length) == min(edited, default=length)


@pytest.mark.parametrize(
    "segments",
    [
        (),
        (Span(0, 3, 0, 0, 0),),
        (Span(0, 3, 0, 0, 0), Span(4, 2, 4, 0, 3)),
        (Span(0, 4, 0, 0, 0), Span(3, 3, 3, 0, 3)),
        (Span(1, 5, 1, 0, 0),),
        (Span(0, 7, 0, 0, 0),),
        (Span(0, 6, 0, 1, 0),),
        (Span(0, 6, 0, -1, 0),),
        (Span(0, 6, 0, 0, -1),),
        (Span(0, 6, -1, 0, 0),),
        (Span(0, 0, 0, 0, 0), Span(0, 6, 0, 0, 0)),
    ],
)
def test_segments_that_do_not_make_a_node(segments: tuple[Span, ...]) -> None:
    with pytest.raises(PlanError):
        check_segments(segments, 6, 1)


@pytest.mark.parametrize(
    "spans",
    [
        (Span(4, 3, 4, 0, 0),),
        (Span(0, 3, 0, 1, 0),),
        (Span(0, 3, 0, 0, 0), Span(2, 2, 2, 0, 0)),
        (Span(3, 1, 3, 0, 0), Span(0, 2, 0, 0, 0)),
        (Span(0, 0, 0, 0, 0),),
        (Span(0, -2, 0, 0, 0),),
        (Span(-1, 2, 0, 0, 0),),
        (Span(0, 3, 0, 0, -1),),
        (Span(0, 3, -1, 0, 0),),
        (Span(1, 3, 0, 0, 0, True),),
    ],
)
def test_reuse_that_does_not_fit_the_prompt(spans: tuple[Span, ...]) -> None:
    with pytest.raises(PlanError):
        check_reuse(Reuse(spans, ("b",), ("d",), 1), 6)
    check_reuse(Reuse((Span(0, 3, 0, 0, 0, True), Span(3, 3, 1, 0, 3)), ("b",), ("d",), 1), 6)


def test_placeholders_of_a_plan() -> None:
    spans = (Span(0, 4, 0, 0, 0, True), Span(6, 2, 9, 0, 4), Span(9, 1, 11, 1, 0))
    plan = ReusePlan(namespace="n", tokens=14, exact=4, spans=spans)
    assert (plan.reused, plan.stop) == (7, 10)
    assert plan.placeholders() == [Run(4, 6), Run(8, 9)]
    assert plan.placeholders(7) == [Run(8, 9)]
    assert ReusePlan(namespace="n", tokens=3).placeholders() == []


# --- nodes and their tree -----------------------------------------------------------------------


def make_node(
    name: str, blocks: tuple[str, ...], parent: str | None = None, segments: tuple[Span, ...] = ()
) -> Node:
    tokens = np.arange(6, dtype=np.int32)
    return Node(
        id=name,
        namespace="n",
        token_bytes=tokens.tobytes(),
        parent=parent,
        segments=segments or (Span(0, 6, 0, 0, 0),),
        blocks=tuple(map(block, blocks)),
        exact_rows=6,
    )


def test_node_ids_tell_namespace_tokens_and_provenance_apart() -> None:
    tokens = np.arange(4, dtype=np.int32)
    ids = {
        node_id("a", tokens, True),
        node_id("b", tokens, True),
        node_id("a", tokens[:3], True),
        node_id("a", tokens, False),
    }
    assert len(ids) == 4
    assert node_id("a", tokens.copy(), True) in ids


def test_a_node_survives_the_catalogue() -> None:
    node = make_node("a", ("b0", "b1"), "p", (Span(0, 4, 7, 0, 1), Span(4, 2, 4, 1, 0, True)))
    back = decode_node(encode_node(node))
    assert msgspec.structs.asdict(back) == msgspec.structs.asdict(node)
    assert back.tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert (back.length, back.exact) == (6, True)


@given(st.integers(0, 5), st.integers(1, 6))
def test_segments_between_two_positions(start: int, length: int) -> None:
    stop = min(start + length, 6)
    segments = (Span(0, 2, 0, 0, 5), Span(2, 3, 40, 1, 7), Span(5, 1, 5, 2, 0))
    node = make_node("a", ("b0", "b1", "b2"), None, segments)
    expected = [s for s in segments if s.start < stop and s.stop > start]
    assert list(segments_between(node, start, stop)) == expected


def test_the_tree_knows_who_uses_what() -> None:
    tree = DeltaTree()
    tree.add(make_node("root", ("b0", "b1")))
    tree.add(make_node("child", ("b1", "b2"), "root"))
    tree.add(make_node("grandchild", ("b2", "b2"), "child"))
    assert [node.id for node in tree.path("grandchild")] == ["root", "child", "grandchild"]
    assert tree.children("root") == ["child"]
    assert tree.users(block("b1")) == {"root", "child"}
    assert tree.blocks() == set(map(block, ("b0", "b1", "b2")))
    gone = tree.remove("root")
    assert gone is not None
    assert gone[1] == [block("b0")]
    assert tree.children("root") == ["child"]
    assert [node.id for node in tree.path("grandchild")] == ["child", "grandchild"]
    assert tree.remove("root") is None
    tree.remove("child")
    last = tree.remove("grandchild")
    assert last is not None
    assert last[1] == [block("b2")]
    assert (len(tree), tree.blocks(), tree.children("root")) == (0, set(), [])


def test_the_tree_remembers_use() -> None:
    tree = DeltaTree()
    for name in ("a", "b", "c"):
        tree.add(make_node(name, ("b0",)))
    tree.touch("a")
    tree.touch("unknown")
    tree.add(make_node("b", ("b0",)))
    assert [node.id for node in tree] == ["c", "a", "b"]
