"""The report on reuse in an answer's `kv_transfer_params`, and in the log."""

from __future__ import annotations

import logging
from typing import Any

from kvshare_connectors.vllm.requests import RequestState
from kvshare_connectors.vllm.settings import PREFIX

from kvshare_store.observability.logs import with_fields
from kvshare_store.plan.spans import reused_of

log = logging.getLogger("kvshare")

_LONGEST = 64
"""Characters of a client's parameter that an answer or the log repeats."""
_MOST = 8
"""Most unknown parameters that an answer names."""


def answer_of(state: RequestState) -> dict[str, Any]:
    """Tokens of the prompt by where their rows came from, and why.

    `prefix_cached` + `exact` + `continued` + `edited` + `recomputed` is the length of the prompt;
    `reused` is `exact` + `continued` + `edited`. `generation` is 0 where all of these rows are
    exact, else how many edits stand between them and full compute. `reason` says why nothing was
    reused, `asked` what the client wanted and did not get, `quality_bound` that the operator's
    bound gave it a stricter policy, `unknown` which of its parameters mean nothing.
    """
    reused = reused_of(state.loaded)
    donors = state.stored.donors if state.stored is not None and state.loaded else ()
    # the daemon decides: another engine may have started it with a stricter policy
    policy = state.stored.policy if state.stored is not None else state.policy
    said: dict[str, Any] = {
        "reused": reused.tokens,
        **reused._asdict(),
        "recomputed": state.length - state.local - reused.tokens,
        "prefix_cached": state.local,
        "generation": _generation(state),
        "donor": donors[0] if donors else "",
        "reason": "" if state.loaded else state.declined or state.reason,
        "policy": policy,
    }
    if state.wish.policy not in (None, policy):
        said["asked"] = str(state.wish.policy)[:_LONGEST]
    if state.stored is not None and state.stored.quality_bound:
        said["quality_bound"] = state.stored.quality_bound
    if state.wish.unknown:
        said["unknown"] = [name[:_LONGEST] for name in state.wish.unknown[:_MOST]]
    return {PREFIX + name: value for name, value in said.items()}


def _generation(state: RequestState) -> int:
    """That of the plan whose rows were loaded, or were still in vLLM's own prefix cache."""
    used = state.loaded or state.in_engine
    return state.stored.generation if state.stored is not None and used else 0


def log_line(state: RequestState, answer: dict[str, Any]) -> None:
    """One line about a request that has ended (`log_requests`)."""
    said = {name.removeprefix(PREFIX): value for name, value in answer.items()}
    line = " ".join(f"{name}={value}" for name, value in said.items())
    extra = with_fields(event="request", request=state.id, **said)
    log.info("kvshare: request %s: %s", state.id, line, extra=extra)


def show_log_lines() -> None:
    """Turn on lines of level INFO, and send them to standard error if logging is not set up."""
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())


class Warnings:
    """Parameters that are not granted: each answer says so, the log once for each kind."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def consider(self, state: RequestState) -> None:
        """Log what this request asked for and did not get, unless that kind was logged before."""
        wish = state.wish
        if wish.unknown:
            name = wish.unknown[0][:_LONGEST]
            self._once("parameter", f"{name!r} is no parameter of KVShare: computed in full")
        elif wish.policy is not None and wish.policy != state.policy:
            asked = wish.policy[:_LONGEST]
            self._once("policy", f"policy {asked!r} was asked for, {state.policy!r} is granted")

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("kvshare: a request's %s (later ones are not logged)", message)
