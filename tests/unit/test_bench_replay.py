"""Counting similar prompts and reusable tokens, on prompts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import figure2, figure4
from benchmarks.prompts import Prompts
from benchmarks.replay import (
    REUSABLE,
    MetadataStore,
    Served,
    Sources,
    block_matching,
    prefix_caching,
    replay,
)
from benchmarks.similar import neighbours
from kvshare_store.lookup.policy import PRESETS

LENGTH = 96


def fresh(seed: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40_000, length).astype(np.int32)


def towards(angle: float, dimensions: int = 384) -> np.ndarray:
    vector = np.zeros(dimensions, np.float32)
    vector[0], vector[1] = np.cos(angle), np.sin(angle)
    return vector


def prompts_of(texts: list[str], angles: list[float], length: int = LENGTH) -> Prompts:
    seeds = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    tokens = [fresh(seeds[text], length) for text in texts]
    return Prompts(texts, tokens, np.stack([towards(angle) for angle in angles]))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")


def test_figure_2_counts_what_came_before() -> None:
    # distances: b to a is 1 - cos(0.3) = 0.045, c to b 0.08, d to all others 1 or more
    prompts = prompts_of(["a", "b", "a", "c", "d"], [0.0, 0.3, 0.0, 0.7, 2.5])
    found = neighbours(prompts.texts, prompts.vectors)
    assert found.duplicate.tolist() == [False, False, True, False, False]
    assert found.earlier[0] == 2
    assert found.earlier[1] == pytest.approx(1 - np.cos(0.3), abs=1e-6)
    assert found.any[0] == pytest.approx(1 - np.cos(0.3), abs=1e-6)
    line = figure2.shares("all", found, np.ones(5, np.bool_))
    assert line.prompts == 5
    assert line.duplicate == 1 / 5
    assert line.within == (1 / 5, 2 / 5, 2 / 5)
    assert line.any_order == 3 / 5  # a, b and the second a


def test_text_without_content_is_like_nothing() -> None:
    vectors = np.stack([np.zeros(384, np.float32), np.zeros(384, np.float32), towards(0.0)])
    found = neighbours(["", " ", "x"], vectors)
    assert found.earlier.tolist() == [2, 2, 1]


def test_figure_2_looks_at_first_turns_apart() -> None:
    prompts = prompts_of(["a", "b", "b", "c"], [0.0, 1.0, 1.0, 2.0])
    lines = figure2.count_lines(prompts, [0, 2])
    counts = {line.what: (line.prompts, line.duplicate) for line in lines}
    assert counts["first turns"] == (2, 0.0)
    assert counts["all human turns"] == (4, 0.25)


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
    assert [s.reused for s in exact] == [0, 0, 100, 140]  # nominated by runs of 64
    assert all(s.reused >= 100 for s in served[1:])


def test_figure_4_rows_and_sets() -> None:
    prompts = prompts_of(["a", "a", "b", "c"], [0.0, 0.0, 0.1, 1.5])
    sets = figure4.similar_sets(prompts)
    assert sets.similar.tolist() == [False, True, True, False]
    assert sets.distinct.tolist() == [False, False, True, False]
    method = figure4.Method("m", [Served(100, 0), Served(100, 95), Served(100, 40), Served(300, 0)])
    row = figure4.row_of(method, "all turns", sets)
    assert row[:2] == ["m", "all turns"]
    assert row[2:] == pytest.approx([0.3375, 135 / 600, 0.25, 0.675, 0.5, 0.4, 0.0])


def test_every_method_is_replayed_and_drawn() -> None:
    prompts = prompts_of(["a", "a", "b"], [0.0, 0.0, 1.0])
    brief = {m.name: m.served for m in figure4.methods(prompts, (), brief=True)}
    assert set(brief) == set(figure4.DRAWN)
    assert all(len(served) == 3 for served in brief.values())
    full = {m.name for m in figure4.methods(prompts, (), brief=False)}
    assert set(brief) < full
    assert len(full) == 12


def test_vectors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import vectors

    asked: list[list[str]] = []

    class Lengths:
        def __init__(self, model: str) -> None:
            pass

        def embed_many(self, texts: list[str]) -> Any:
            asked.append(texts)
            return np.stack([np.full(384, len(text), np.float32) for text in texts])

    monkeypatch.setattr(vectors, "SentenceEmbedder", Lengths)
    assert vectors.text_vectors(["aa", "b", "aa"], "m", tmp_path)[:, 0].tolist() == [2, 1, 2]
    with next(tmp_path.glob("*.vectors")).open("ab") as file:
        file.write(b"a torn record")
    assert vectors.text_vectors(["ccc", "b"], "m", tmp_path)[:, 0].tolist() == [3, 1]
    assert vectors.text_vectors(["ccc", "aa"], "m", tmp_path)[:, 0].tolist() == [3, 2]
    assert asked == [["b", "aa"], ["ccc"]]
