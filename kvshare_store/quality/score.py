"""Score: how far a served answer was from the answer of full compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

SCORED_TOKENS = 16
"""Answer tokens that are scored, at most."""
_MOST_NATS = 1e4
Regret = Annotated[float, msgspec.Meta(ge=0.0, le=_MOST_NATS)]
Regrets = Annotated[tuple[Regret, ...], msgspec.Meta(max_length=SCORED_TOKENS)]
"""What engines report: checked when it is decoded, so that sums stay numbers."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, scored by the model that computed prompt and answer in full."""

    namespace: str
    """Its digest."""
    traffic: str
    """The class of the request (`quality/traffic.py`). It does not matter for controls."""
    policy: str
    """The rung of the ladder that the prompt was planned under."""
    regrets: Regrets
    """For each answer token from the first on: log p(best token) - log p(served token), nats."""
    greedy: bool
    """The request asked for the likeliest token at each step."""
    control: bool
    """The prompt was served in full: such scores say how far apart two computations in full are."""
    computed: float | None = None
    """The share of the prompt's tokens behind its exact prefix that were computed, if known."""
    distance: int | None = None
    """Tokens from the end of the nearest edit to the answer, if known."""

    @property
    def regret(self) -> float:
        """The mean of the regrets, nats; 0 without any."""
        return sum(self.regrets) / len(self.regrets) if self.regrets else 0.0

    @property
    def diverged(self) -> int | None:
        """The first position at which another token was the likeliest; None if there is none, or if
        the request was not greedy, where that says nothing."""
        if not self.greedy:
            return None
        return diverged_at(self.regrets)


def diverged_at(regrets: Sequence[float]) -> int | None:
    """The first token that is not the model's best; None if all are."""
    return next((at for at, regret in enumerate(regrets) if regret > 0), None)
