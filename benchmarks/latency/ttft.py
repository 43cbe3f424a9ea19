"""Time to first token of prompts whose text is partly known: full prefill, prefix caching, KVShare.

For each length: a text is stored, then prompts arrive that share a part of it. See
`docs/design/benchmarks.md` for how it is timed.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.data.edited_prompts import SCATTERED, Texts, follower, long_texts
from benchmarks.harness.engines import Arm, Engine, Home, Timed, in_turn, rest, running
from benchmarks.harness.models import model_name
from benchmarks.harness.result import Options, Result
from benchmarks.latency.ttft_table import DEADLINE_MS, TARGET_LENGTHS, Key, Sample, draw, result
from kvshare_store.cli.progress import progress

__all__ = ["draw", "measure"]

LENGTHS = {256: 5, 512: 5, 1024: 5, 2048: 3, 4096: 3, 8160: 1}
"""Tokens of a prompt, and how often everything is measured at that length."""
SHORT_LENGTHS = {512: 2, 2048: 1}
POLICIES = ("balanced", "faithful", "aggressive")
_ARMS = {
    "full": Arm(caching=False),
    "prefix": Arm(caching=True),
    "kvshare": Arm(caching=False, kvshare=True),
}


class Prompt(NamedTuple):
    """One kind of follower, and who serves it."""

    share: float
    """Of its tokens that the donor has."""
    places: int
    """At which it differs: 1 or `SCATTERED`."""
    prefix: bool
    """Whether prefix caching serves it too."""
    host: Sequence[str]
    """Policies that serve it with all rows in the host tier."""
    disk: Sequence[str] = ()
    """Policies that serve it with all rows on disk only."""

    @property
    def edits(self) -> str:
        """In words."""
        return "none" if not self.share else "one" if self.places == 1 else "scattered"


PROMPTS = (
    Prompt(0.0, 1, True, ("balanced",)),
    Prompt(0.50, SCATTERED, True, POLICIES, ("balanced",)),
    Prompt(0.75, SCATTERED, False, POLICIES, ("balanced",)),
    Prompt(0.90, SCATTERED, True, (*POLICIES, "exact"), (*POLICIES, "exact")),
    Prompt(0.95, SCATTERED, False, POLICIES, ("balanced",)),
    Prompt(0.90, 1, True, (*POLICIES, "exact")),
    Prompt(0.95, 1, False, POLICIES),
)
FEW_PROMPTS = (
    Prompt(0.0, 1, True, ("balanced",)),
    Prompt(0.90, SCATTERED, True, ("balanced", "aggressive"), ("balanced",)),
    Prompt(0.95, 1, False, ("balanced",)),
)


def prompts_of(length: int, *, short: bool) -> tuple[Prompt, ...]:
    """What is served at this length; the longest prompts take too long for everything."""
    return FEW_PROMPTS if short or length > max(TARGET_LENGTHS) else PROMPTS


class Grid:
    """One run: engines, store, and what has been measured so far."""

    def __init__(self, engines: dict[str, Engine], home: Home, texts: Texts) -> None:
        self.engines, self.home, self.texts = engines, home, texts
        self.samples: dict[Key, list[Sample]] = defaultdict(list)
        self.declined: dict[str, int] = {}
        self._run = uuid.uuid4().hex[:8]
        self._turn = 0

    def warm_up(self) -> None:
        """Every path once, with a prompt that is not reported."""
        base = self.texts.take(1024)
        self._store(base, "warm-up")
        made = follower(base, 0.9, SCATTERED, self.texts)
        for engine in self.engines.values():
            engine.ask(made, f"{self._run}-warm-up")

    def measure(self, length: int, prompts: Sequence[Prompt], repetition: int) -> Iterator[None]:
        """Store one text and serve all followers of it."""
        base = self.texts.take(length)
        salt = f"{length}-{repetition}"
        self._store(base, salt)
        yield
        for prompt in prompts:
            self._serve(prompt, base, salt)
            yield

    def _store(self, base: list[int], salt: str) -> None:
        self.engines["prefix"].forget()
        self.home.clear()
        for name in ("prefix", "kvshare"):
            self.engines[name].ask(base, f"{self._run}-{salt}")
        rest(self.engines["kvshare"], self.home)
        self.home.pin()

    def _serve(self, prompt: Prompt, base: list[int], salt: str) -> None:
        """One follower, by all arms in turn. None of them finds it: the store keeps the text that
        it was pinned with and nothing else, and each engine with a cache gets it once."""
        self._turn += 1
        arms = ["full", *["prefix"] * prompt.prefix]
        arms += [f"host {policy}" for policy in prompt.host]
        arms += [f"disk {policy}" for policy in prompt.disk]
        served: dict[str, tuple[Timed, float]] = {}
        tokens = follower(base, prompt.share, prompt.places, self.texts)
        for arm in in_turn(arms, self._turn):
            served[arm] = self._ask(arm, tokens, base, f"{self._run}-{salt}")
        for arm, (timed, recomputed) in served.items():
            key = Key(len(base), prompt.share, prompt.edits, arm)
            self.samples[key].append(Sample(timed, served["full"][0], recomputed))

    def _ask(self, arm: str, tokens: list[int], base: list[int], salt: str) -> tuple[Timed, float]:
        if arm in ("full", "prefix"):
            timed = self.engines[arm].ask(tokens, salt)
            return timed, 1 - timed.cached / timed.tokens
        tier, _, policy = arm.partition(" ")
        if tier == "disk":
            self._empty_host()
        before = self.home.stats()
        timed = self.engines["kvshare"].ask(tokens, salt, policy=policy)
        rest(self.engines["kvshare"], self.home)
        after = self.home.stats()
        for reason, count in after["declined"].items():
            more = count - before["declined"].get(reason, 0)
            self.declined[reason] = self.declined.get(reason, 0) + more
        computed = after["tokens_recomputed"] - before["tokens_recomputed"]
        if tier == "disk":  # all of it back into the host tier, whatever this arm has read
            self.engines["kvshare"].ask(base, salt)
        return timed, computed / timed.tokens

    def _empty_host(self) -> None:
        self.home.restart()
        for _ in range(2):  # the engine notices with the first one and greets with the second
            self.engines["kvshare"].ask(self.texts.take(8), "nobody")


def measure(options: Options) -> Result:
    """Serve the grid."""
    lengths = SHORT_LENGTHS if options.short else LENGTHS
    if options.n is not None:
        lengths = dict.fromkeys(lengths, options.n)
    # a request may ask for a stricter policy than the configured one, never for a laxer one;
    # followers must not serve others, and embeddings have a measurement of their own
    fields: dict[str, Any] = {"policy": "aggressive", "max_nodes": 1, "semantic": "never"}
    fields["plan_deadline_ms"] = DEADLINE_MS
    prompts = {size: prompts_of(size, short=options.short) for size in lengths}
    steps = sum(times * (len(prompts[size]) + 1) for size, times in lengths.items())
    with progress() as shown, running(options, _ARMS, **fields) as (engines, home):
        grid = Grid(engines, home, long_texts(options))
        task = shown.add_task("Serving prompts", total=steps)
        grid.warm_up()
        for repetition in range(max(lengths.values())):
            for length in (size for size, times in lengths.items() if repetition < times):
                for _ in grid.measure(length, prompts[length], repetition):
                    shown.advance(task)
    return result(grid.samples, grid.declined, options, model_name(options))
