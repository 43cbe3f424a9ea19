"""What is packed in memory behaves as the plain thing would."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.nodes import block_users, postings
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.edits import Edit
from kvshare_store.nodes.node import Node
from kvshare_store.nodes.packed import Edits, Names, Packed, Sizes, Spans
from kvshare_store.nodes.postings import Postings
from kvshare_store.plan.spans import Span

numbers = st.integers(0, 2**40)
names = st.binary(min_size=32, max_size=32).map(bytes.hex)
spans = st.builds(Span, numbers, numbers, numbers, numbers, numbers, st.booleans())
edits = st.builds(Edit, st.sampled_from(["keep", "insert"]), numbers, numbers)


@pytest.fixture(autouse=True, scope="module")
def crowded() -> Iterator[None]:
    """Arrays are merged all the time, names collide, and a few users are many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "_FEW", 3)
        patch.setattr(block_users, "_FEW", 3)
        patch.setattr(block_users, "hash", lambda name: int(name[:2], 16) % 3, raising=False)
        yield


# --- sequences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values"), [(Names, names), (Spans, spans), (Edits, edits), (Sizes, numbers)]
)
@given(data=st.data())
def test_a_packed_sequence_is_its_tuple(
    kind: type[Packed[object]], values: st.SearchStrategy[object], data: st.DataObject
) -> None:
    plain = tuple(data.draw(st.lists(values, max_size=6)))
    packed = kind.of(plain)
    assert packed == plain == packed.unpacked() == tuple(packed)
    assert packed == kind(packed.raw)
    assert (len(packed), bool(packed), list(reversed(packed))) == (
        len(plain), bool(plain), list(reversed(plain)),
    )  # fmt: skip
    for at in range(-len(plain), len(plain)):
        assert packed[at] == plain[at]
        assert tuple(packed[at:]) == plain[at:]
        assert plain[at] in packed
        assert packed.index(plain[at]) == plain.index(plain[at])
        assert packed.index(plain[at], at) == plain.index(plain[at], at)
    for at in (len(plain), -len(plain) - 1):
        with pytest.raises(IndexError):
            packed[at]


@pytest.mark.parametrize(
    "bad",
    ["", "ab", "ab" * 31, "ab" * 33, "AB" * 32, "xy" * 32, "ab" * 31 + " a", "ab " * 21 + "a"],
)
def test_what_is_no_name_is_not_packed(bad: str) -> None:
    with pytest.raises(ValueError, match=r"hex|names of blocks"):
        Names.of(["cd" * 32, bad])


def test_bytes_across_two_names_are_no_name() -> None:
    packed = Names.of(["ab" * 16 + "cd" * 16, "ab" * 16 + "ef" * 16, "12" * 32])
    assert "cd" * 16 + "ab" * 16 not in packed
    assert "12" * 32 in packed
    assert packed.index("12" * 32) == 2
    with pytest.raises(ValueError, match=r"^$"):
        packed.index("cd" * 16 + "ab" * 16)
    for none in ("", "12", "12" * 31 + " 1", "12" * 31 + "xy", "AB" * 16 + "CD" * 16, None):
        assert none not in packed


def test_lengths_that_add_up_are_not_enough() -> None:
    with pytest.raises(ValueError, match="names of blocks"):
        Names.of(["ab" * 31, "cd" * 33])


# --- ids by key ---------------------------------------------------------------------------------

changes = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 9), st.lists(st.integers(0, 5), max_size=4)),
    st.tuples(st.just("extend"), st.integers(0, 9), st.lists(st.integers(0, 5), max_size=4)),
    st.tuples(st.just("remove"), st.integers(0, 9), st.just([])),
)
_LARGE = 2**64 - 7
"""Keys are 64 bits wide, and many are greater than what a float can tell apart."""


@given(st.lists(changes, max_size=40))
def test_postings_against_a_plain_list(steps: list[tuple[str, int, list[int]]]) -> None:
    packed, plain = Postings(), list[tuple[int, str]]()
    for kind, number, offsets in steps:
        node_id, keys = str(number), [_LARGE + offset for offset in offsets]
        if kind == "remove":
            packed.remove(node_id)
            plain = [entry for entry in plain if entry[1] != node_id]
        else:
            plain += [(key, node_id) for key in keys]
            if kind == "add":
                packed.add(node_id, keys)
            else:
                whose = np.zeros(len(keys), np.int64)
                packed.extend([node_id], np.asarray(keys, np.uint64), whose)
        for key in range(_LARGE, _LARGE + 6):
            expected = [node_id for at, node_id in reversed(plain) if at == key]
            assert list(packed.find(key)) == expected
            assert not expected or packed.known([key]) == [True]
    packed.settle()
    assert {i for _, i in plain} <= {str(i) for i in range(10) if str(i) in packed}


# --- the tree -----------------------------------------------------------------------------------


class PlainTree:
    """The nodes, the least recently used first; everything else is looked up."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def users(self, block: str) -> set[str]:
        return {node.id for node in self.nodes.values() if block in tuple(node.blocks)}

    def blocks(self) -> set[str]:
        return {name for node in self.nodes.values() for name in node.blocks}

    def unused_after(self, node: Node | None, then: Node | None) -> set[str]:
        kept = set(then.blocks) if then is not None else set()
        before = set(node.blocks) if node is not None else set()
        return {name for name in before - kept if not self.users(name)}


SIZES = {f"{at:02x}" * 32: 100 + at for at in range(7)}
owned = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=5)
actions = st.tuples(
    st.sampled_from(["add", "add", "remove", "replace", "touch"]), st.integers(0, 5), owned
)


def make_node(number: int, blocks: list[str]) -> Node:
    return Node(
        id=f"node {number}",
        namespace="n",
        token_bytes=bytes(4),
        segments=(Span(0, 1, 0, 0, 0),),
        blocks=tuple(blocks),
        block_bytes=tuple(SIZES[name] for name in blocks),
        exact_rows=1,
    )


def agree(tree: DeltaTree, plain: PlainTree) -> None:
    assert [node.id for node in tree] == list(plain.nodes)
    assert [node.id for node in tree.victims()] == list(plain.nodes)
    assert [node.id for node in tree.victims("n")] == list(plain.nodes)
    assert [node.id for node in tree.newest(9)] == list(plain.nodes)[::-1]
    assert tree.blocks() == plain.blocks()
    assert tree.block_count == len(plain.blocks())
    assert tree.bytes_of("n") == sum(SIZES[name] for name in plain.blocks())
    for name in SIZES:
        users = plain.users(name)
        assert tree.users(name) == users
        assert (tree.user_count(name), tree.uses(name)) == (len(users), bool(users))


@given(st.dictionaries(st.integers(0, 5), owned, max_size=5), st.lists(actions, max_size=25))
def test_the_tree_against_a_plain_dictionary(
    first: dict[int, list[str]], steps: list[tuple[str, int, list[str]]]
) -> None:
    tree, plain = DeltaTree(), PlainTree()
    nodes = [make_node(number, blocks) for number, blocks in first.items()]
    tree.fill((node, float(len(nodes) - at)) for at, node in enumerate(nodes))
    plain.nodes = {node.id: node for node in nodes}
    agree(tree, plain)
    for action, number, blocks in steps:
        node = make_node(number, blocks)
        here = plain.nodes.get(node.id)
        if action == "remove":
            gone = tree.remove(node.id)
            plain.nodes.pop(node.id, None)
            assert (gone is None) == (here is None)
            assert set(gone[1] if gone else ()) == plain.unused_after(here, None)
        elif action == "touch" or (action == "add" and here is not None):
            tree.touch(node.id) if action == "touch" else tree.add(node)
            if here is not None:
                plain.nodes[node.id] = plain.nodes.pop(node.id)
        elif action == "add":
            tree.add(node)
            plain.nodes[node.id] = node
        elif here is not None:
            unused = tree.replace(node)
            plain.nodes[node.id] = node
            assert set(unused) == plain.unused_after(here, node)
        agree(tree, plain)


def test_the_longest_unused_comes_first_whatever_the_order_of_the_rows() -> None:
    tree = DeltaTree()
    rows = [(make_node(0, ["00" * 32]), 5.0), (make_node(1, ["01" * 32]), 9.0)]
    tree.fill([*rows, (make_node(0, ["02" * 32]), 20.0)])
    assert [node.id for node in tree] == ["node 1", "node 0"]
    assert tree.blocks() == {"00" * 32, "01" * 32}, "of two rows of one node the first counts"


@pytest.mark.parametrize("name", ["", "b", "AB" * 32, "ab" * 33, "ü" * 64])
def test_what_is_no_name_of_a_block_has_no_users(name: str) -> None:
    tree = DeltaTree()
    assert tree.users(name) == set()
