"""Prompts are as similar to each other, and as long, as documented."""

from collections.abc import Callable
from itertools import combinations

import pytest
from rapidfuzz.distance import Levenshtein
from tokenizers import Tokenizer

from examples.engines.small_model import prepare_model
from examples.prompts.families import (
    FAMILIES,
    PROMPTS,
    WARM_UP,
    Change,
    edited,
    misses,
    read_recipes,
)

CHAT_TOKENS = 27
"""Tokens that the chat template adds."""
FOLLOWERS = [
    pytest.param(family.donor, follower, id=f"{family.name}-{number}")
    for family in FAMILIES
    for number, follower in enumerate(family.followers, start=1)
]

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def encode() -> Encode:
    tokenizer = Tokenizer.from_file(str(prepare_model() / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids


def tokens_in(encode: Encode, text: str) -> int:
    return len(encode(text)) + CHAT_TOKENS


def test_there_are_enough_families_and_followers() -> None:
    assert len(FAMILIES) >= 6
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(3 <= len(family.followers) <= 4 for family in FAMILIES)


def test_every_prompt_differs_from_every_other() -> None:
    prompts = [
        text for family in (*FAMILIES, WARM_UP) for text in (family.donor, *family.followers)
    ]
    prompts += misses()
    assert len(set(prompts)) == len(prompts)


def test_every_file_is_used() -> None:
    names = {family.name for family in (*FAMILIES, WARM_UP)}
    assert {path.stem for path in PROMPTS.glob("*.txt")} == names
    assert {path.name for path in PROMPTS.glob("*.yaml")} == {f"{n}.followers.yaml" for n in names}
    assert len(list((PROMPTS / "misses").iterdir())) == len(misses())


def test_every_follower_says_what_it_is() -> None:
    for family in FAMILIES:
        recipes = read_recipes(family.name)
        assert len(recipes) == len(family.followers)
        assert all(recipe["what"].endswith(".") and recipe["changes"] for recipe in recipes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_prompts_have_the_promised_sizes(encode: Encode, family) -> None:
    for text in (family.donor, *family.followers):
        assert 400 <= tokens_in(encode, text) <= 2000


def test_enough_families_are_long(encode: Encode) -> None:
    long = [f.name for f in FAMILIES if min(tokens_in(encode, t) for t in f.followers) >= 1000]
    assert len(long) >= 4


@pytest.mark.parametrize(("donor", "follower"), FOLLOWERS)
def test_followers_change_little(encode: Encode, donor: str, follower: str) -> None:
    request = encode(follower)
    kept = sum(
        block.size for block in Levenshtein.opcodes(encode(donor), request).as_matching_blocks()
    )
    assert kept >= 0.90 * len(request)


def test_most_long_followers_change_in_few_places(encode: Encode) -> None:
    long = [
        len(recipe["changes"])
        for family in FAMILIES
        if tokens_in(encode, family.donor) >= 1000
        for recipe in read_recipes(family.name)
    ]
    assert sum(count <= 6 for count in long) >= 0.75 * len(long)
    assert max(long) > 6


def test_misses_have_the_promised_sizes(encode: Encode) -> None:
    assert len(misses()) >= 8
    assert all(400 <= tokens_in(encode, text) <= 2000 for text in misses())


def test_misses_resemble_nothing(encode: Encode) -> None:
    unrelated = [encode(text) for text in misses()]
    donors = [encode(family.donor) for family in (*FAMILIES, WARM_UP)]
    pairs = [
        *combinations(unrelated, 2),
        *((miss, donor) for miss in unrelated for donor in donors),
    ]
    for one, other in pairs:
        blocks = Levenshtein.opcodes(one, other).as_matching_blocks()
        assert max(block.size for block in blocks) < 12


def test_changes_apply_in_order() -> None:
    changes: list[Change] = [{"old": "one", "new": "two"}, {"old": "two fish", "new": ""}]
    assert edited("one fish, red fish", changes) == ", red fish"


@pytest.mark.parametrize("passage", ["blue", "fish"])
def test_a_change_needs_exactly_one_place(passage: str) -> None:
    with pytest.raises(ValueError, match=passage):
        edited("one fish, red fish", [{"old": passage, "new": "bird"}])
