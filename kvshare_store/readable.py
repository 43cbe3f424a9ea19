"""Numbers, times, reasons, verdicts and foreign text, as people read them."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvshare_store.errors.wording import duration, short

_SIZES = ("KiB", "MiB", "GiB", "TiB")
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Signs that make text read in another order than it is stored."""
_BAR = 20
ENOUGH = 30
"""Scores, and controls, below which people are shown no rate: its standard error is 9 points there,
and more below. The ladder needs no such number, it goes by limits."""

KIND_COLOURS = {"exact": "green", "continued": "magenta", "edited": "cyan"}
"""Of the kinds of reuse, in a terminal."""

Verdict = Mapping[str, Any]
"""What a second look has said of an answer, in plain types."""

REASONS = {
    "edit": "no stored prompt has these tokens here",
    "window": "they follow an edit closely (edit_window, edit_growth)",
    "min_run": "too few unedited tokens in a row (min_run)",
    "tail": "the end of the prompt (tail; the last token always)",
    "generation": "stored, but in rows that the policy does not build on (max_generation)",
    "delimiters": "delimiters behind an edit (delimiters)",
    "cost": "reuse would save too little (min_saving_ms, approximation_price)",
    "policy": "the policy reuses prefixes only",
    "source": "behind text that only one other source has sent (unconfirmed_share)",
}
"""Why tokens are computed again."""


MISSES = {
    "empty_store": "nothing is stored yet for this model and tenant",
    "no_donor": "no stored prompt shares enough text",
    "engine_prefix": "vLLM's own prefix cache already had all that the store could give",
    "nothing_kept": "the policy recomputes all that could be shared",
    "no_saving": "loading would take as long as computing",
    "quality_bound": "under the bound its class gets a stricter policy, which leaves nothing",
    "short_prompt": "shorter than min_prompt_tokens",
    "not_resident": "the rows did not come from disk or a remote in time",
    "deadline": "the rows did not come from disk or a remote in time",
    "draining": "the daemon is ending",
    "too_many_plans": "the tenant asks for more than plans_per_second",
    "blocks_gone": "the rows left the store meanwhile",
    "lossy": "a lossy codec has changed the rows",
    "policy_off": "the request asked for no reuse",
    "unknown_policy": "the request asked for a policy that does not exist",
    "unknown_parameter": "the request asked for what does not exist",
    "unavailable": "the daemon did not answer",
    "preempted": "vLLM took the request's memory away and computed its prompt again",
    "queued_too_long": "it waited for half the lease of its plan, which was asked for again",
    "aborted": "it ended before its rows were loaded",
    "not_taken": "its plan ended without any of its rows having been loaded",
    "lease_expired": "its lease ran out, or its engine died",
}
"""Why nothing of a prompt is reused: the reasons that users meet (docs/vllm.md), and the daemon's
own. The others speak for themselves."""


def miss_text(reason: str) -> str:
    """What a reason means; empty where it speaks for itself."""
    if reason.startswith("load_"):
        return "the rows were lost while they were loaded: the answer says load_failed"
    return MISSES.get(reason, "")


def assumed_text(speed: float) -> str:
    """What an expected saving rests on before any prefill was measured; empty for a speed of 0."""
    return f"assumed {speed:,.0f} tokens/s: nothing measured yet" if speed else ""


def size(nbytes: int) -> str:
    """`1.5 MiB`."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, len(_SIZES))
    return f"{nbytes / 1024**power:,.1f} {_SIZES[power - 1]}"


def share(part: int, whole: int) -> str:
    """`12.5 %`, or a dash where there is no whole."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    return "< 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def many(count: int, word: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def percent(rate: float) -> str:
    """`12.5 %` of a share or of a difference of two."""
    return f"{100 * rate:.1f} %".replace("-0.0 ", "0.0 ").replace("-", "\N{MINUS SIGN}")


def limits(rate: Sequence[float]) -> str:
    """`1.0 % (0.2 to 3.0 %)` of a mean and its limits."""
    mean, low, high = map(percent, rate)
    return f"{mean} ({low.removesuffix(' %')} to {high})"


def enough(scores: int, controls: int) -> bool:
    """Whether a rate beyond the floor says something to people. Without any control it does: the
    floor is 0 then."""
    return scores >= ENOUGH and (not controls or controls >= ENOUGH)


def too_few(scores: int, controls: int) -> str:
    """`too few scores (3, 1 control)`; empty where there are enough."""
    if enough(scores, controls):
        return ""
    beside = f", {many(controls, 'control')}" if controls else ""
    return f"too few scores ({scores:,}{beside})"


def bounds(start: int, stop: int | None) -> str:
    """`64 to 255`: whole numbers from `start` to below `stop`."""
    return f"{start:,} or more" if stop is None else f"{start:,} to {stop - 1:,}"


def steering_text(steering: Mapping[str, Any]) -> str:
    """What a bound makes of a prompt's class, as a sentence."""
    text = (
        f"class {printable(steering['traffic'])} is at {steering['rung']} under a quality_bound of "
        f"{percent(steering['bound'])}"
    )
    if steering["tried"]:
        text += f"; {percent(steering['share'])} of its requests get {steering['tried']}"
    return text


_NOW = {
    "": "Now the same:",
    "policy": "Now another plan, under another policy:",
    "donors": "Now another plan, since the store holds other prompts:",
    "plan": "Now another plan, since what the store holds or has measured has changed:",
    "outcome": "The plan, whose rows were not used then:",
}


def then_text(request: Mapping[str, Any], differs: str) -> str:
    """What a logged request was served, and how far that is the plan that follows."""
    reused = request["exact"] + request["continued"] + request["edited"]
    donors = ", ".join(map(short, request["donors"]))
    from_store = f"{reused:,} tokens from {donors}" if reused else "nothing reused"
    reason = f" ({one_line(request['reason'])})" if request["reason"] else ""
    cached = f"{request['cached']:,} from the engine's prefix cache, " if request["cached"] else ""
    left = f"{cached}{request['recomputed']:,} recomputed"
    return f"Then: {from_store}{reason}, {left}. {_NOW[differs]}"


def outcome_text(request: Mapping[str, Any]) -> str:
    """`edited`, or `miss: no_donor` with the reason; `exact (quality_bound)` where a bound made the
    policy stricter."""
    if request["reason"]:
        return f"{request['outcome']}: {one_line(request['reason'])}"
    bounded = request.get("steering")  # a daemon of the release before does not say it
    return f"{request['outcome']} (quality_bound)" if bounded else str(request["outcome"])


def no_tokens_text(request: Mapping[str, Any]) -> str:
    """Why a logged request is not planned again: its tokens are not here."""
    if request["policy"]:
        return "Its tokens were not kept (setting log_prompts), so it is not planned again."
    return "It was declined before any plan was made, so its tokens are not here."


def rates_text(space: Mapping[str, Any]) -> str:
    """What a namespace may ask for in a second: `50 plans, 2.5 saves`."""
    rates = {what: space[f"{what}_per_second"] for what in ("plans", "saves")}
    limits = [f"{rate:,.10g} {what}" for what, rate in rates.items() if rate]
    return ", ".join(limits) or "no limit"


def source_text(candidate: Mapping[str, Any]) -> str:
    """Whose a candidate is, and how many of the tokens kept of it nobody has confirmed."""
    found: str = candidate.get("source", "")
    rows = candidate.get("unconfirmed", 0)
    if not rows:
        return found
    tokens = f"{rows:,} tokens"
    return f"{found} ({tokens})" if found == "unconfirmed" else f"{found}, {tokens} unconfirmed"


def bar(part: int, whole: int) -> str:
    """A bar of fixed width; anything at all shows at least a thin line."""
    cells = round(_BAR * min(part, whole) / whole) if whole else 0
    filled = "█" * cells or ("▏" if part else "")
    return filled + "░" * (_BAR - len(filled))


def age(created: float, now: float | None = None) -> str:
    """`5 min`: how long ago that was."""
    return duration((time.time() if now is None else now) - created)


def milliseconds(seconds: float) -> str:
    """`12.3 ms`."""
    return f"{seconds * 1e3:,.2f} ms"


def took(seconds: float) -> str:
    """As `milliseconds`, and a dash where nothing was done."""
    return milliseconds(seconds) if seconds else "-"


def provenance(generation: int) -> str:
    """`exact`, or from which generation of edits the rows come."""
    return f"edited, generation {generation}" if generation else "exact"


def printable(text: str) -> str:
    """Prompts come from strangers: whatever could steer a terminal becomes a visible sign."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if char in "\n\t" or (unicodedata.category(char) != "Cc" and char not in _BIDI):
        return char
    return chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\N{REPLACEMENT CHARACTER}"


def one_line(text: str) -> str:
    """Text with its line ends and runs of blanks joined."""
    return " ".join(printable(text).split())


def as_one_name(text: str) -> str:
    """A name in one line, its line ends and tabs as visible signs: two names stay two."""
    return (
        printable(text)
        .replace("\n", "\N{SYMBOL FOR LINE FEED}")
        .replace("\t", "\N{SYMBOL FOR HORIZONTAL TABULATION}")
    )


def shortened(text: str, limit: int, *, head: bool = True, tail: bool = True) -> str:
    """At most about `limit` characters: the beginning, the end, or both of a long text."""
    if len(text) <= limit:
        return text
    part = limit // (head + tail)
    return (text[:part] if head else "") + " … " + (text[-part:] if tail else "")


# --- verdicts -------------------------------------------------------------------------------------


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
    return f"floor {verdict['floor']:.4f} ({many(verdict['floor_answers'], 'control')})"


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
