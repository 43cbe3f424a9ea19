"""Edit scripts and alignment: what is called equal is equal, and what is applied comes out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.errors import PlanError
from kvshare_store.lookup import align as align_module
from kvshare_store.lookup.align import align
from kvshare_store.lookup.equal_runs import common_prefix
from kvshare_store.nodes.edits import Match, as_tokens, edit_script
from kvshare_store.nodes.grams import GRAM, gram_hashes
from tests.support.edits import apply_edits

few = st.lists(st.integers(0, 4), max_size=40)  # a small alphabet: many accidental matches
many = st.lists(st.integers(0, 5000), max_size=60)
prompts = st.one_of(few, many)


def arr(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


@st.composite
def edited_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A donor and a request made of it by a few edits."""
    donor = draw(prompts)
    request = list(donor)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(request)))
        gone = draw(st.integers(0, 6))
        request[at : at + gone] = draw(st.lists(st.integers(0, 9000), max_size=6))
    return donor, request


def longest_common_subsequence(a: list[int], b: list[int]) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b):
            before, lengths[j + 1] = (
                lengths[j + 1],
                before + 1 if x == y else max(lengths[j], lengths[j + 1]),
            )
    return lengths[-1]


def fewest_edits(a: list[int], b: list[int]) -> int:
    costs = list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, costs[0] = costs[0], i + 1
        for j, y in enumerate(b):
            before, costs[j + 1] = (
                costs[j + 1],
                min(before + (x != y), costs[j] + 1, costs[j + 1] + 1),
            )
    return costs[-1]


def check_matches(matches: list[Match], request: np.ndarray, donor: np.ndarray) -> None:
    at = source = 0
    for match in matches:
        assert match.length > 0
        assert match.start >= at
        assert match.source >= source
        ours = request[match.start : match.start + match.length]
        assert len(ours) == match.length
        assert (ours == donor[match.source : match.source + match.length]).all()
        at, source = match.start + match.length, match.source + match.length
    assert at <= len(request)
    assert source <= len(donor)


def cost_of(matches: list[Match], request: np.ndarray, donor: np.ndarray) -> int:
    """Edits of the script that keeps the matches: a replaced token counts once."""
    edits = edit_script(matches, len(donor), request)
    return sum(max(e.stop - e.start, len(e.tokens)) for e in edits if e.kind != "keep")


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens", [[1.5], ["a"], [[1, 2]], [-1], [2**31], [None], 3, [True, False], [1, "2"]]
)
def test_what_is_no_prompt(tokens: object) -> None:
    with pytest.raises(PlanError):
        as_tokens(tokens)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_prompts_become_int32(tokens: list[int]) -> None:
    for given_ in (tokens, tuple(tokens), np.asarray(tokens, np.int64)):
        found = as_tokens(given_)
        assert (found.dtype, found.tolist()) == (np.dtype(np.int32), tokens)
        assert found.flags.c_contiguous


# --- edit scripts -------------------------------------------------------------------------------


@given(edited_pairs())
def test_the_script_makes_the_request_of_the_donor(pair: tuple[list[int], list[int]]) -> None:
    donor, request = arr(pair[0]), arr(pair[1])
    edits = edit_script(align(request, donor), len(donor), request)
    assert apply_edits(edits, donor).tolist() == request.tolist()
    at = 0
    for edit in edits:
        assert edit.start == at
        removed, added = edit.stop - edit.start, len(edit.tokens)
        kinds = {(True, False): "delete", (False, True): "insert", (True, True): "replace"}
        assert edit.kind == ("keep" if edit.kind == "keep" else kinds[removed > 0, added > 0])
        assert edit.kind != "keep" or (removed > 0 and not added)
        at = edit.stop
    assert at == len(donor)


def test_the_four_kinds() -> None:
    donor, request = arr([1, 2, 3, 4, 5]), arr([9, 1, 8, 3, 5])
    edits = edit_script([Match(1, 0, 1), Match(3, 2, 1), Match(4, 4, 1)], len(donor), request)
    assert [edit.kind for edit in edits] == [
        "insert", "keep", "replace", "keep", "delete", "keep",
    ]  # fmt: skip
    assert apply_edits(edits, donor).tolist() == request.tolist()


# --- alignment ----------------------------------------------------------------------------------


@given(edited_pairs())
def test_matches_are_equal_tokens_in_order(pair: tuple[list[int], list[int]]) -> None:
    donor, request = arr(pair[0]), arr(pair[1])
    matches = align(request, donor)
    check_matches(matches, request, donor)
    for first, second in itertools.pairwise(matches):  # runs are as long as can be
        assert (first.start + first.length, first.source + first.length) != second[:2]


@given(few, few)
def test_alignment_has_the_fewest_edits(a: list[int], b: list[int]) -> None:
    request, donor = arr(a), arr(b)
    matches = align(request, donor)
    check_matches(matches, request, donor)
    assert cost_of(matches, request, donor) == fewest_edits(b, a)
    kept = sum(match.length for match in matches)
    longest = longest_common_subsequence(a, b)
    assert kept <= longest
    assert kept >= max(len(a), len(b)) - fewest_edits(b, a) or kept == longest


@given(prompts, prompts)
def test_common_prefix(a: list[int], b: list[int]) -> None:
    expected = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    assert common_prefix(arr(a), arr(b)) == expected


def test_very_long_prompts_are_cut_at_equal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory allowed the result is still right, and nearly as good."""
    generator = np.random.default_rng(3)
    donor = generator.integers(0, 50_000, 3000).astype(np.int32)
    request = donor.copy()
    for at in (100, 700, 1500, 2500):
        request[at : at + 5] = generator.integers(50_000, 60_000, 5)
    request = np.concatenate([request[:900], donor[2000:2040], request[950:]]).astype(np.int32)
    exact = align(request, donor)
    monkeypatch.setattr(align_module, "_MAX_CELLS", 4000)
    anchored = align(request, donor)
    check_matches(anchored, request, donor)
    kept, best = (sum(m.length for m in matches) for matches in (anchored, exact))
    assert best > 2800
    assert kept >= best - 60


@given(edited_pairs())
def test_alignment_around_equal_runs_is_never_wrong(pair: tuple[list[int], list[int]]) -> None:
    donor, request = arr(pair[0] * 2), arr(pair[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_module, "_MAX_CELLS", 9)
        check_matches(align(request, donor), request, donor)


def test_prompts_without_a_common_token_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_module, "_MAX_CELLS", 100)
    assert align(np.arange(50, dtype=np.int32), np.arange(50, 100, dtype=np.int32)) == []


@given(prompts)
def test_gram_hashes_stand_for_their_tokens(tokens: list[int]) -> None:
    hashes = gram_hashes(arr(tokens))
    assert len(hashes) == max(0, len(tokens) - GRAM + 1)
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(hashes))]
    assert len(set(hashes.tolist())) == len(set(grams))
    assert hashes.tolist() == gram_hashes(arr([*tokens, 7]))[: len(hashes)].tolist()
