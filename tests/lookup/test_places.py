"""Where a donor has its grams, and how much of a request it seems to have."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.lookup.places import KnownPlaces, Places, Sought, guess
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.grams import GRAM, gram_hashes
from kvshare_store.nodes.node import Node
from kvshare_store.plan.spans import Run, Span


def noise(seed: int, length: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 30_000, length).astype(np.int32)


def node_of(tokens: Tokens, name: str) -> Node:
    return Node(
        id=name,
        namespace="n",
        token_bytes=tokens.tobytes(),
        segments=(Span(0, len(tokens), 0, 0, 0),),
        blocks=("b",),
        exact_rows=len(tokens),
    )


@given(st.lists(st.integers(0, 2), max_size=60))
def test_a_place_is_the_first_with_the_gram(tokens: list[int]) -> None:
    array = np.asarray(tokens, np.int32)
    hashes = gram_hashes(array)
    for at, place in enumerate(Places(array).find(hashes).tolist()):
        if place >= 0:
            assert tokens[place : place + GRAM] == tokens[at : at + GRAM]
            assert hashes.tolist().index(hashes[at]) == place


@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 2), max_size=60))
def test_any_gram_is_here_where_one_has_a_place(donor: list[int], request: list[int]) -> None:
    places, hashes = Places(np.asarray(donor, np.int32)), gram_hashes(np.asarray(request, np.int32))
    assert places.has_any(hashes) == bool((places.find(hashes) >= 0).any())
    empty = np.zeros(1, np.uint64)  # the hash that slots without a gram seem to have
    assert not Places(np.asarray(donor[:7], np.int32)).has_any(empty)


@pytest.mark.parametrize("length", [2_000, 60_000])
def test_most_grams_have_a_place_and_no_others(length: int) -> None:
    donor = noise(1, length)
    places, own = Places(donor), Sought(donor)
    at, hashes = own.sample(places.one_of)
    found = places.find(hashes)
    assert np.mean(found == at) > 0.5
    assert (found[found >= 0] == at[found >= 0]).all()
    other = Sought(noise(2, length))
    assert (places.find(other.sample(places.one_of).hashes) < 0).all()
    assert places.nbytes <= 16 * 2 * length / places.one_of


def test_grams_inside_gaps() -> None:
    sought = Sought(noise(3, 100), start=10)
    gaps = [Run(0, 20), Run(40, 40 + GRAM), Run(60, 61)]
    found = sought.inside(gaps, 1)
    assert found.at.tolist() == [10, 11, 12, 40]
    assert (found.hashes == gram_hashes(sought.tokens)[found.at]).all()
    assert sought.inside(gaps, 1) is found  # the next donor is asked for the same
    assert sought.inside(gaps[1:], 1).at.tolist() == [40]
    assert set(sought.inside(gaps, 2).at.tolist()) < set(found.at.tolist())
    assert not len(sought.inside([], 1).at)


@pytest.mark.parametrize("length", [1_000, 40_000])
def test_a_guess_is_about_what_is_shared(length: int) -> None:
    donor = noise(4, length)
    half = np.concatenate((noise(5, length // 2), donor[: length // 2]))
    assert guess(Sought(donor), Places(donor), length) == pytest.approx(length, rel=0.02)
    assert guess(Sought(half), Places(donor), length) == pytest.approx(length / 2, rel=0.05)
    assert guess(Sought(half, length // 2), Places(donor), length) == pytest.approx(
        length / 2, rel=0.05
    )
    assert guess(Sought(donor), Places(donor), length // 4) == pytest.approx(length / 4, rel=0.05)
    assert guess(Sought(noise(6, length)), Places(donor), length) == 0


def test_tables_are_remembered_within_their_memory() -> None:
    nodes = [node_of(noise(at, 500), str(at)) for at in range(40)]
    one = Places(nodes[0].tokens).nbytes
    known = KnownPlaces(nbytes=10 * one)
    assert known.of(nodes[0]) is known.of(nodes[0])
    for node in nodes[1:]:
        known.of(nodes[0])  # whoever is asked for stays
        known.of(node)
    here = [node for node in nodes if known.known(node)]
    assert nodes[0] in here
    assert nodes[1] not in here
    assert 5 <= len(here) <= 10


def test_many_threads_ask_for_tables() -> None:
    nodes = [node_of(noise(at, 300), str(at)) for at in range(30)]
    known = KnownPlaces(nbytes=8 * Places(nodes[0].tokens).nbytes)
    wrong: list[str] = []

    def ask(seed: int) -> None:
        for at in np.random.default_rng(seed).integers(0, len(nodes), 200).tolist():
            table, own = known.of(nodes[at]), Sought(nodes[at].tokens)
            found = table.find(own.sample(1).hashes)
            if not (found == np.arange(len(found)))[found >= 0].all() or (found < 0).all():
                wrong.append(nodes[at].id)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(map(known.known, nodes)) <= 8
