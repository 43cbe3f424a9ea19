"""What nominates donors, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.nodes.grams import anchors, gram_hashes
from kvshare_store.nodes.index import LONG, NamespaceIndex
from kvshare_store.nodes.node import Node, node_id
from kvshare_store.nodes.postings import Postings
from kvshare_store.nodes.prefix_chain import PrefixChain
from kvshare_store.nodes.vector_matrix import VectorMatrix
from kvshare_store.nodes.vectors import Vectors, lexical_vector
from kvshare_store.plan.spans import Span

RUN = 3
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # many shared beginnings


def make_node(tokens: list[int], exact_rows: int) -> Node:
    array = np.asarray(tokens, np.int32)
    return Node(
        id=node_id("n", array, exact_rows == len(tokens)),
        namespace="n",
        token_bytes=array.tobytes(),
        segments=(Span(0, len(tokens), 0, 0, 0),),
        blocks=("b",),
        exact_rows=exact_rows,
        generation=int(exact_rows < len(tokens)),
    )


def shared_runs(tokens: list[int], node: Node) -> int:
    other = node.tokens.tolist()[: node.exact_rows]
    same = 0
    while same < min(len(tokens), len(other)) and tokens[same] == other[same]:
        same += 1
    return same // RUN


@given(
    st.lists(st.tuples(prompts, st.integers(0, 14)), max_size=12),
    st.lists(st.integers(0, 11), max_size=8),
    prompts,
)
def test_the_chain_nominates_who_shares_most(
    saved: list[tuple[list[int], int]], removed: list[int], request: list[int]
) -> None:
    chain = PrefixChain(RUN)
    nodes = {}
    for tokens, exact_rows in saved:
        node = make_node(tokens, min(exact_rows, len(tokens)))
        if node.id not in nodes:
            nodes[node.id] = node
            chain.add(node.id, node.tokens[: node.exact_rows])
    for at in removed:
        if at < len(saved):
            tokens, exact_rows = saved[at]
            gone = nodes.pop(make_node(tokens, min(exact_rows, len(tokens))).id, None)
            if gone is not None:
                chain.remove(gone.id)
    nominated = chain.nominate(chain.hashes(np.asarray(request, np.int32)))
    best = max((shared_runs(request, node) for node in nodes.values()), default=0)
    assert bool(nominated) == (best > 0)
    assert len(nominated) == len(set(nominated)) <= 8
    assert all(shared_runs(request, nodes[node_id]) == best for node_id in nominated)


@given(st.lists(st.tuples(prompts, st.integers(0, 14)), min_size=1, max_size=12), prompts)
def test_many_nodes_at_once_are_as_one_by_one(
    saved: list[tuple[list[int], int]], request: list[int]
) -> None:
    made = [make_node(tokens, min(exact, len(tokens))) for tokens, exact in saved]
    nodes = list({node.id: node for node in made}.values())
    one_by_one, at_once = PrefixChain(RUN), PrefixChain(RUN)
    for node in nodes:
        one_by_one.add(node.id, node.tokens[: node.exact_rows])
    half = len(nodes) // 2
    for part in (nodes[:half], nodes[half:], nodes):  # who is known stays as it is
        at_once.extend([(node.id, node.tokens[: node.exact_rows]) for node in part])
    hashes = at_once.hashes(np.asarray(request, np.int32))
    assert at_once.nominate(hashes) == one_by_one.nominate(hashes)


def test_the_newest_is_nominated_first() -> None:
    chain = PrefixChain(RUN)
    nodes = [make_node([1, 1, 1, at], 4) for at in range(12)]
    for node in nodes:
        chain.add(node.id, node.tokens[: node.exact_rows])
    nominated = chain.nominate(chain.hashes(np.asarray([1, 1, 1, 5], np.int32)))
    assert nominated == [node.id for node in nodes[:3:-1]]


def test_removing_everything_leaves_nothing() -> None:
    chain = PrefixChain(RUN)
    nodes = [make_node([1, 1, 1, 1, 1, 1, at], 7) for at in range(5)]
    for node in nodes:
        chain.add(node.id, node.tokens[: node.exact_rows])
    for node in nodes:
        chain.remove(node.id)
    assert chain.nominate(chain.hashes(np.ones(9, np.int32))) == []
    assert len(chain._nodes) == 0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=120),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_the_matrix_against_brute_force(
    changes: list[tuple[bool, int]], count: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    matrix, plain = VectorMatrix(), {}
    for adds, number in changes:
        name = f"node-{number}"
        if adds:
            plain[name] = unit(generator)
            matrix.add(name, plain[name])
        else:
            plain.pop(name, None)
            matrix.remove(name)
        assert len(matrix) == len(plain)
    query = unit(generator)
    expected = sorted(((float(v @ query), name) for name, v in plain.items()), reverse=True)
    found = matrix.nearest(query, count)
    assert [name for name, _ in found] == [name for _, name in expected[:count]]
    np.testing.assert_allclose(
        [score for _, score in found], [score for score, _ in expected[:count]], atol=1e-4
    )


def unit(generator: np.random.Generator) -> np.ndarray:
    vector = generator.standard_normal(384).astype(np.float32)
    return vector / np.linalg.norm(vector)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 1000))
def test_many_vectors_at_once_are_as_one_by_one(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    one_by_one, at_once = VectorMatrix(), VectorMatrix()
    for batch, size in enumerate(sizes):
        names = [f"{batch}/{at}" for at in range(size)]
        vectors = np.asarray([unit(generator) for _ in names], np.float32).reshape(size, 384)
        at_once.extend(names, vectors)
        for name, vector in zip(names, vectors, strict=True):
            one_by_one.add(name, vector)
    query = unit(generator)
    assert at_once.nearest(query, 8) == one_by_one.nearest(query, 8)


def test_what_is_packed_nominates_as_what_was_not() -> None:
    """Of prompts as people write them: the same eight, but where two are as near to a hair."""
    generator = np.random.default_rng(0)
    words = (generator.zipf(1.3, (400, 300)) % 5_000).astype(np.int32)
    words[1::2, :200] = words[::2, :200]  # half of them share most with another
    vectors = np.stack([lexical_vector(each) for each in words])
    matrix = VectorMatrix()
    matrix.extend([str(at) for at in range(400)], vectors)
    for query in vectors[::7]:
        exact = vectors @ query
        found = [int(name) for name, _ in matrix.nearest(query, 8)]
        assert min(exact[found]) >= np.sort(exact)[-8] - 5e-5
        scores = [score for _, score in matrix.nearest(query, 8)]
        np.testing.assert_allclose(scores, exact[found], atol=5e-5)


def test_the_matrix_grows_past_its_first_rows() -> None:
    matrix = VectorMatrix()
    eye = np.eye(384, dtype=np.float32)
    for at in range(300):
        matrix.add(str(at), eye[at])
    assert all(
        matrix.nearest(eye[at], 1) == [(str(at), pytest.approx(1.0))] for at in range(0, 300, 37)
    )


def test_a_large_matrix_still_finds_what_is_like_the_query() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((6_000, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = VectorMatrix()
    for at, row in enumerate(rows):
        matrix.add(str(at), row)
    for at in range(0, 6_000, 3):
        matrix.remove(str(at))
    matrix.add("1", rows[0])  # replaced where there is a sketch of the old one
    kept = [at for at in range(6_000) if at % 3 and at != 1]
    assert len(matrix) == len(kept) + 1
    for at in kept[::97]:
        like = rows[at] + 1.5 * rows[(at * 7) % 6_000]  # cosines of 0.55 and 0.83
        (name, cosine), *_ = matrix.nearest(rows[at], 8)
        assert (name, round(cosine, 3)) == (str(at), 1.0)
        names = [name for name, _ in matrix.nearest(like / np.linalg.norm(like), 8)]
        assert str(at) in names
    assert matrix.nearest(rows[0], 1)[0][0] == "1"
    assert str(3) not in [name for name, _ in matrix.nearest(rows[3], 100)]


# --- passages -----------------------------------------------------------------------------------

keys_of_ids = st.lists(st.sets(st.integers(0, 6), max_size=5), max_size=12)


@given(keys_of_ids, st.sets(st.integers(0, 11)), st.sets(st.integers(0, 8)), st.integers(1, 4))
def test_ids_with_most_of_the_keys(
    saved: list[set[int]], removed: set[int], asked: set[int], count: int
) -> None:
    postings = Postings()
    half = len(saved) // 2
    ids = [str(at) for at in range(half)]
    keys = np.asarray([key for some in saved[:half] for key in sorted(some)], np.uint64)
    postings.extend(ids, keys, np.arange(half).repeat([len(some) for some in saved[:half]]))
    for at in range(half, len(saved)):
        postings.add(str(at), sorted(saved[at]))
    for at in removed:
        postings.remove(str(at))
    votes = {
        at: len(some & asked) for at, some in enumerate(saved) if at not in removed and some & asked
    }
    best = sorted(votes, key=lambda at: (votes[at], at), reverse=True)[:count]
    found = postings.most_often(np.asarray(sorted(asked), np.uint64), len(saved) + 1, count)
    assert found == [str(at) for at in best]


def test_a_key_that_many_have_counts_for_the_last_of_them() -> None:
    postings = Postings()
    for at in range(5_000):  # more than are kept apart before they are merged
        postings.add(str(at), [1])
    for at in range(5_000, 5_003):
        postings.add(str(at), [1, 2])
    assert postings.most_often(np.asarray([1], np.uint64), 4, 9)[:3] == ["5002", "5001", "5000"]
    assert len(postings.most_often(np.asarray([1], np.uint64), 4, 9)) <= 8


def test_long_prompts_are_nominated_by_their_passages() -> None:
    draws = np.random.default_rng(8)
    texts = [draws.integers(0, 50, LONG).astype(np.int32) for _ in range(20)]
    index, more = NamespaceIndex(RUN), NamespaceIndex(RUN)
    nodes = [make_node(text.tolist(), LONG) for text in texts]
    vectors = [Vectors(lexical_vector(text), None) for text in texts]
    for node, vector in zip(nodes, vectors, strict=True):
        index.add(node, vector)
    more.extend(list(zip(nodes, vectors, strict=True)))
    passage = anchors(gram_hashes(texts[7][500:1_500]))
    for each in (index, more):
        assert each.passages.most_often(passage, 8, 1) == [nodes[7].id]
    index.remove(nodes[7])
    assert nodes[7].id not in index.passages.most_often(passage, 8, 20)
