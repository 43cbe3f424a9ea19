"""The last requests of a store: how each ended, why, and how long it took. In memory only.

There is no prompt text in it, unless `log_prompts` asks for that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvshare_store.bounded import Latest
from kvshare_store.errors.wording import short
from kvshare_store.lookup.policy import ReusePolicy
from kvshare_store.lookup.steering import Steering
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.edits import Tokens
from kvshare_store.plan import Outcome, ReusePlan
from kvshare_store.plan.spans import Span

if TYPE_CHECKING:
    from kvshare_store.lookup.explanation import Part

_ENTRIES = 1000
_EARLY = 256
"""Requests that engines have said something of, and whose plans have not ended for the log yet."""
_PROMPT_BYTES = 64 << 20
"""Tokens of all logged prompts together."""


class Asked(NamedTuple):
    """A lookup: what was asked, by whom, and since when."""

    namespace: Namespace
    tokens: int
    policy: ReusePolicy
    start: float
    """By `perf_counter`."""
    request: str = ""
    """The engine's name of the request; empty if it did not say."""
    prompt: bytes = b""
    """Its tokens, where they are logged."""
    far: bool = False
    """Rows go to another machine."""
    look: bool = False
    """For a second look: nobody's request, so it is neither counted as one nor logged."""
    source: bytes = b""
    """Who sends it, hashed."""
    pools: tuple[str, ...] = ()
    """Whose rows it may use beside its namespace's."""
    stores: bool = True
    """Whoever asks will store it: no reader."""
    steering: Steering | None = None
    """What made the policy stricter than it would be without a bound."""

    def plan(self, declined: str = "", wiped: str = "") -> ReusePlan:
        """A plan without rows."""
        return ReusePlan(
            namespace=self.namespace.digest,
            tokens=self.tokens,
            policy=self.policy.name,
            declined=declined,
            wiped=wiped,
        )


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """One request that has ended. Tokens and seconds."""

    number: int
    """Counted since the daemon started."""
    request: str
    at: float
    """Unix seconds of its end."""
    namespace: str
    """The beginning of the digest."""
    model: str
    tenant: str
    lora: str
    policy: str
    tokens: int
    outcome: str
    """`exact`, `continued`, `edited` or `miss`."""
    reason: str = ""
    """Why it missed."""
    exact: int = 0
    continued: int = 0
    edited: int = 0
    recomputed: int = 0
    cached: int = 0
    """The engine's own prefix cache had them."""
    generation: int = 0
    donors: tuple[str, ...] = ()
    spans: tuple[tuple[int, int, str], ...] = ()
    """Runs `start … stop-1` of one kind that were planned."""
    lookup: float = 0.0
    load: float = 0.0
    held: float = 0.0
    """From the question to the end of the plan."""
    prefill: float = 0.0
    """From the step that took the plan to the first token: what loading the rows and computing the
    others took. 0: the engine did not say."""
    saving_ms: float = 0.0
    """What the plan was expected to save."""
    assumed_speed: float = 0.0
    """Tokens per second of prefill that this rests on, where none was measured; 0 where one was."""
    prompt: bytes = b""
    pools: tuple[str, ...] = ()
    """Whose rows it could use beside its namespace's."""
    source: bytes = b""
    """Who has sent it, hashed."""
    steering: Steering | None = None
    """What made the policy stricter than it would have been without a bound."""

    @property
    def seconds(self) -> float:
        """What the store had of the request's time."""
        return self.lookup + self.load


MOST_RUNS = 256
"""Of one plan that are kept; a plan may have thousands."""


class _Early(NamedTuple):
    """What an engine says of a request before the end of its plan, which is reported another
    way."""

    prefill: float = 0.0
    cached: int = 0


class RequestLog:
    """A ring of the last requests. Thread-safe."""

    def __init__(self, *, prompts: bool = False) -> None:
        """`prompts`: keep their tokens too."""
        self.prompts = prompts
        self._lock = threading.Lock()
        self._entries: deque[Logged] = deque(maxlen=_ENTRIES)
        self._early: Latest[str, _Early] = Latest(_EARLY)
        self._count = 0

    def missed(self, asked: Asked, reason: str, lookup: float) -> None:
        """A lookup ended without a plan."""
        self._add(_entry(asked, "miss", reason=reason, recomputed=asked.tokens, lookup=lookup))

    def declined(
        self, reason: str, tokens: int, request: str = "", namespace: Namespace | None = None
    ) -> None:
        """No plan was made, so neither policy nor tokens are known. `namespace`: None where nobody
        has said whose request it was."""
        whose = {} if namespace is None else _whose(namespace)
        said = {"request": request, "outcome": "miss", "reason": reason, "tokens": tokens}
        self._add(whose | said | {"recomputed": tokens})

    def ended(
        self, asked: Asked, plan: ReusePlan, lookup: float, held: float, outcome: Outcome
    ) -> None:
        """A plan was used, or given up where the outcome says `failed`."""
        entry = _entry(
            asked,
            "miss" if outcome.failed else outcome.reused.kind,
            reason=outcome.failed,
            exact=outcome.exact,
            continued=outcome.continued,
            edited=outcome.edited,
            recomputed=outcome.recomputed or (asked.tokens if outcome.failed else 0),
            cached=outcome.cached,
            generation=plan.generation,
            donors=plan.donors,
            spans=runs_by_kind(plan.spans)[:MOST_RUNS],
            lookup=lookup,
            load=outcome.seconds,
            held=held,
            saving_ms=plan.saving_ms,
            assumed_speed=plan.assumed_speed,
        )
        self._add(entry)

    def prefilled(self, request: str, seconds: float) -> None:
        """The engine has the first token of a request, so long after it took the plan."""
        with self._lock:
            at = self._place(request)
            if at is None:
                self._early[request] = self._said(request)._replace(prefill=seconds)
            else:
                self._entries[at] = msgspec.structs.replace(self._entries[at], prefill=seconds)

    def engine_cached(self, request: str, tokens: int) -> None:
        """The engine's own prefix cache had `tokens` of a request that is logged as a miss: its
        plan, if it had one, does not say so."""
        if not request:
            return
        with self._lock:
            at = self._place(request)
            if at is None:
                self._early[request] = self._said(request)._replace(cached=tokens)
            else:
                self._entries[at] = _cached(self._entries[at], tokens)

    def _said(self, request: str) -> _Early:
        return self._early.get(request) or _Early()

    def _place(self, request: str) -> int | None:
        """Where the last entry of this name is."""
        places = range(len(self._entries) - 1, -1, -1)
        return next((at for at in places if self._entries[at].request == request), None)

    def _add(self, fields: dict[str, object]) -> None:
        blank = {"request": "", "namespace": "", "model": "", "tenant": "", "lora": "",
                 "policy": "", "at": time.time()}  # fmt: skip
        with self._lock:
            self._count += 1
            early = self._early.pop(str(fields.get("request")), _Early())
            fields |= {"prefill": early.prefill, "number": self._count}
            entry = _cached(Logged(**(blank | fields)), early.cached)  # type: ignore[arg-type]
            self._entries.append(entry)
            if entry.prompt:
                self._forget_prompts()

    def _forget_prompts(self) -> None:
        room = _PROMPT_BYTES
        for at in reversed(range(len(self._entries))):
            room -= len(self._entries[at].prompt)
            if room < 0 and self._entries[at].prompt:
                self._entries[at] = msgspec.structs.replace(self._entries[at], prompt=b"")

    def forget(self, digest: str) -> None:
        """Drop what a namespace has asked."""
        with self._lock:
            kept = [
                e for e in self._entries if not (e.namespace and digest.startswith(e.namespace))
            ]
            self._entries = deque(kept, maxlen=_ENTRIES)

    def last(
        self, limit: int | None, *, declined: bool = False, slow: bool = False, request: str = ""
    ) -> list[Logged]:
        """At most `limit`, the newest first; `slow`: the slowest first. `declined`: misses only.
        `request`: the one of this number, or those whose name begins so."""
        with self._lock:
            found = list(self._entries)[::-1]
        if declined:
            found = [entry for entry in found if entry.outcome == "miss"]
        if request:
            by_name = [entry for entry in found if entry.request.startswith(request)]
            found = by_name or [entry for entry in found if str(entry.number) == request]
        if slow:
            found.sort(key=lambda entry: -entry.seconds)
        return found[:limit]


def _cached(entry: Logged, tokens: int) -> Logged:
    """A miss of which the engine's own prefix cache had so many tokens, unless its plan has said
    what that had."""
    if entry.outcome != "miss" or entry.cached:
        return entry
    cached = min(tokens, entry.recomputed)
    return msgspec.structs.replace(entry, cached=cached, recomputed=entry.recomputed - cached)


def _entry(asked: Asked, outcome: str, **fields: object) -> dict[str, object]:
    return {
        **_whose(asked.namespace),
        "request": asked.request,
        "policy": asked.policy.name,
        "tokens": asked.tokens,
        "outcome": outcome,
        "prompt": asked.prompt,
        "pools": asked.pools,
        "source": asked.source,
        "steering": asked.steering,
        **fields,
    }


def _whose(space: Namespace) -> dict[str, object]:
    return {
        "namespace": short(space.digest),
        "model": space.model,
        "tenant": space.tenant,
        "lora": space.lora,
    }


def prompt_of(tokens: Tokens, logged: bool) -> bytes:
    """What the log keeps of a prompt."""
    return tokens.tobytes() if logged else b""


def runs_by_kind(spans: Sequence[Span | Part]) -> tuple[tuple[int, int, str], ...]:
    """Spans of one kind that touch, as one run. Or parts of an explanation."""
    runs: list[tuple[int, int, str]] = []
    begin, stop, kind = 0, 0, ""
    for span in spans:
        if span.start != stop or span.kind != kind:
            runs.append((begin, stop, kind))
            begin, kind = span.start, span.kind
        stop = span.stop
    return (*runs[1:], (begin, stop, kind)) if spans else ()
