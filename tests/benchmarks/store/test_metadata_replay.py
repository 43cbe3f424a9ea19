"""Reusable tokens, on prompts made by hand."""

from __future__ import annotations

import numpy as np

from benchmarks.store.metadata_replay import (
    REUSABLE,
    MetadataStore,
    Served,
    Sources,
    block_matching,
    prefix_caching,
    replay,
)
from kvshare_store.lookup.policy import PRESETS
from tests.benchmarks.made_prompts import fresh, towards


def test_prefix_caching_and_block_matching_know_their_blocks() -> None:
    first = fresh(0)
    tail = np.concatenate((fresh(1, 32), first[32:]))  # another beginning, blocks 2 to 5 the same
    shifted = np.concatenate((fresh(2, 1), first[:-1]))  # the same text, one token further on
    stream = [first, first, tail, shifted, np.concatenate((first[:40], fresh(3, 56)))]
    assert [s.reused for s in prefix_caching(stream)] == [0, 80, 0, 0, 32]
    # the last block holds the token that has to be computed anyway
    assert [s.reused for s in block_matching(stream)] == [0, 80, 48, 0, 32]


def test_short_prompts_are_stored_but_not_counted() -> None:
    first = fresh(0, 48)
    stream = [first, np.concatenate((first, fresh(1, 48)))]
    served = replay(MetadataStore(REUSABLE, Sources()), stream, np.zeros((2, 384), np.float32))
    assert served == [Served(96, 48, 1)]
    assert [s.tokens for s in prefix_caching(stream)] == [96]


def test_kvshare_reuses_what_moved_and_what_two_donors_have() -> None:
    a, b = fresh(0), fresh(1)
    moved = np.concatenate((fresh(2, 10), a[:86]))
    both = np.concatenate((a[:48], b[48:]))
    stream = [a, b, moved, both]
    none = np.zeros((4, 384), np.float32)
    reused = [
        s.reused for s in replay(MetadataStore(REUSABLE, Sources(), all_exact=True), stream, none)
    ]
    assert reused == [0, 0, 85, 95]  # the last token is always computed
    one = MetadataStore(REUSABLE, Sources(), max_donors=1, all_exact=True)
    assert [s.reused for s in replay(one, stream, none)][3] == 48


def test_each_source_nominates_alone() -> None:
    # much the same words in a wholly other order: no lexical cosine to speak of until the passage
    a = fresh(0)
    request = np.concatenate((fresh(5, 60), a[:36]))
    near, far = towards(0.2), towards(1.5)
    for sources, vector, expected in (
        (Sources(lexical=False, own=True), near, 35),
        (Sources(lexical=False, own=True), far, 35),
        (Sources(lexical=False, own=True, within=0.05), near, 35),
        (Sources(lexical=False, own=True, within=0.05), far, 0),
        (Sources(lexical=False, own=True, semantic=False), near, 0),
        (Sources(semantic=False), far, 35),
    ):
        store = MetadataStore(REUSABLE, sources, all_exact=True)
        served = replay(store, [a, request], np.stack([towards(0.0), vector]))
        assert served[1].reused == expected, sources


def test_policies_build_on_what_they_stored() -> None:
    a = fresh(0, 200)
    chain = [a]
    for at in range(3):  # each changes one more token of the one before
        changed = chain[-1].copy()
        changed[60 + 40 * at] = 50_000 + at
        chain.append(changed)
    none = np.zeros((4, 384), np.float32)
    store = MetadataStore(PRESETS["balanced"], Sources())
    served = replay(store, chain, none)
    assert served[0].reused == 0
    assert [node.generation for node in store.tree] != [0, 0, 0, 0]
    assert max(node.generation for node in store.tree) <= PRESETS["balanced"].max_generation
    exact = replay(MetadataStore(PRESETS["exact"], Sources()), chain, none)
    assert [s.reused for s in exact] == [0, 60, 100, 140]  # nominated by runs of 16
    assert all(s.reused >= 100 for s in served[1:])
