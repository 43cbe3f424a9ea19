"""What an explanation says: the candidates, what becomes of each token, and what that takes."""

from __future__ import annotations

import msgspec

from kvshare_store.lookup.steering import Steering


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A stored prompt that was nominated. Lengths in tokens."""

    node: str
    found_by: tuple[str, ...]
    """`prefix`, `words`, `text`, `passages`, or `asked` where it was named by whoever asks."""
    score: float
    """Cosine of the lexical vectors."""
    tokens: int
    prefix: int
    """It begins with so many tokens of the request."""
    usable: int
    """So many of its leading rows may be built on under the policy."""
    shared: int
    """Tokens of the request that it has in the same order, whoever they are taken from."""
    covers: int
    """Tokens that the planner took from it,"""
    kept: int
    """and those of them that the policy did not recompute."""
    taken: bool
    why: str
    source: str = ""
    """Who has sent it: `own`, `confirmed` by several, or `unconfirmed`; empty where no limit and no
    source asks for that."""
    unconfirmed: int = 0
    """Tokens kept of it behind the exact prefix whose rows were computed behind unconfirmed
    text."""


class Part(msgspec.Struct, frozen=True):
    """Positions `start … stop-1` of the request, all of one fate."""

    start: int
    stop: int
    kind: str
    """`exact`, `continued`, `edited` or `recomputed`."""
    reason: str = ""
    """Which rule recomputes them."""
    donor: str = ""
    source: int = -1
    """Position of the first of them in the donor."""


class Divergence(msgspec.Struct, frozen=True):
    """Where the request leaves the stored prompt with which it begins longest."""

    node: str
    position: int
    request: tuple[int, ...]
    donor: tuple[int, ...]


class Expected(msgspec.Struct, frozen=True):
    """Milliseconds, by the rates that were measured so far."""

    without: float
    """Computing the whole prompt."""
    compute: float
    load: float
    seams: float
    """What placeholder runs cost beside their tokens."""
    saving: float
    assumed_speed: float = 0.0
    """Tokens per second of prefill that these rest on, where none was measured; 0 where one was."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One plan, and why."""

    policy: str
    tokens: int
    declined: str
    generation: int
    by_kind: dict[str, int]
    by_reason: dict[str, int]
    """Recomputed tokens."""
    expected: Expected | None
    divergence: Divergence | None
    candidates: tuple[Candidate, ...]
    parts: tuple[Part, ...]
    steering: Steering | None = None
    """What a bound makes of it; None where it steers nothing."""
