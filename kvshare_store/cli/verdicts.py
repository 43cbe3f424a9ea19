"""What a second look has said of an answer, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvshare_store.readable import age, printable

Verdict = Mapping[str, Any]


def verdict_lines(verdict: Verdict | None) -> Iterable[str]:
    """A verdict as `show` and `log` have it, one sentence a line; none if there is none."""
    if verdict is None:
        return
    if verdict["scored"]:
        what = "served in full" if verdict["control"] else f"policy {printable(verdict['policy'])}"
        yield f"scored {age(verdict['at'])} ago: {verdict['scored']} tokens, {what}"
        yield (
            f"regret {verdict['regret']:.4f} nats a token, {verdict['worst']:.4f} at most; "
            + _floor(verdict)
        )
        yield _divergence(verdict)
    if verdict.get("settled"):
        yield f"settled {age(verdict['settled'])} ago"


def _floor(verdict: Verdict) -> str:
    if verdict["floor"] is None:
        return "floor not known yet"
    return f"floor {verdict['floor']:.4f} ({verdict['floor_answers']:,} controls)"


def _divergence(verdict: Verdict) -> str:
    if not verdict["greedy"]:
        return "not greedy, or with tokens forbidden: that it differs says nothing"
    if verdict["diverged"] is None:
        return "these tokens are those of full compute"
    return f"differs from full compute from token {verdict['diverged'] + 1} on"


def regret_cell(verdict: Verdict | None) -> str:
    """The regret for a column, `!` where the answer differs from that of full compute."""
    if verdict is None or not verdict["scored"]:
        return "-"
    return f"{verdict['regret']:.3f}" + ("!" if verdict["diverged"] is not None else "")
