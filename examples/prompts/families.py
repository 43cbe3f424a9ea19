"""Families of similar prompts, and prompts that are unlike all others.

A family is what a busy server sees from people who share a template. One person sends the donor;
others send followers, which differ in names and numbers and have sentences added or left out.
Both are files beside this one: NAME.txt is the donor, NAME.followers.yaml says for every follower
which passages of the donor it changes, so it is plain to see what differs. A passage that is taken
out has an empty `new`; one that is added repeats its neighbour. All texts were written for this
project, the names in them are made up.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import yaml

PROMPTS = Path(__file__).parent


class Change(TypedDict):
    """One passage of the donor, which occurs exactly once in it, and what it became."""

    old: str
    new: str


class FollowerRecipe(TypedDict):
    """How one follower is made from its donor."""

    what: str
    changes: list[Change]


@dataclass(frozen=True)
class Family:
    """A prompt that is sent first, and the similar prompts that follow it."""

    name: str
    donor: str
    followers: tuple[str, ...]


def read_prompt(name: str) -> str:
    """The text of one prompt file."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").strip()


def read_recipes(name: str) -> list[FollowerRecipe]:
    """The followers of a family as they are written down."""
    recipes: list[FollowerRecipe] = yaml.safe_load(
        (PROMPTS / f"{name}.followers.yaml").read_text(encoding="utf-8")
    )
    return recipes


def edited(text: str, changes: list[Change]) -> str:
    """Apply the changes in order; a passage that is absent or ambiguous is an error."""
    for change in changes:
        if (count := text.count(change["old"])) != 1:
            raise ValueError(f"Expected this passage once, counted {count}: {change['old']!r}")
        text = text.replace(change["old"], change["new"])
    return text


def read_family(name: str) -> Family:
    """Build a family from its two files."""
    donor = read_prompt(name)
    followers = (edited(donor, recipe["changes"]) for recipe in read_recipes(name))
    return Family(name, donor, tuple(followers))


def misses() -> tuple[str, ...]:
    """Prompts without a similar donor anywhere, for measuring what a miss costs."""
    names = sorted(path.stem for path in (PROMPTS / "misses").glob("*.txt"))
    return tuple(read_prompt(f"misses/{name}") for name in names)


FAMILIES: tuple[Family, ...] = tuple(
    read_family(name)
    for name in (
        "medical_report",
        "exam_grading",
        "contract",
        "support_ticket",
        "book_character",
        "few_shot",
        "code_review",
    )
)

# Sent before anything is measured, so that every code path has run once. Never reported.
WARM_UP = read_family("warmup")
