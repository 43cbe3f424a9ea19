"""One run of the demo: which prompts go to which engine, in which order, and what is counted."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from examples.demo import report
from examples.demo.report import FollowerResult, Results, Reuse, Times
from examples.engines.engine import Answer, Engine
from examples.engines.store import StoreView
from examples.prompts.families import FAMILIES, WARM_UP, Family, misses

ANSWER_TOKENS = 32
REPETITIONS = 3
DONOR_KEPT_S = 30
"""Longest wait for the store to keep a donor; without it nothing can be measured."""
KEPT_S = 0.5
"""Longest wait for other prompts. Some never become nodes; nothing depends on them."""
COMPARED = ("full", "prefix", "kvshare")


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line that says why."""


def reuse_between(before: dict[str, Any], after: dict[str, Any], answer: Answer) -> Reuse:
    """How many of a prompt's tokens were reused and recomputed, from the counters around it.

    The store does not count the tokens that the engine's own prefix cache already covered; they are
    what is missing from the prompt's length.
    """
    edited = after["tokens_reused_edited"] - before["tokens_reused_edited"]
    exact = after["tokens_reused_exact"] - before["tokens_reused_exact"]
    if edited + exact:
        recomputed = after["tokens_recomputed"] - before["tokens_recomputed"]
    else:
        recomputed = answer.tokens - answer.cached
    return Reuse(answer.tokens - edited - recomputed, edited, recomputed)


@dataclass(frozen=True)
class Workload:
    """The prompts that are sent, and how often."""

    families: Sequence[Family] = FAMILIES
    misses: Sequence[str] = misses()
    repetitions: int = REPETITIONS
    repeats: bool = True
    """Whether prompts are also sent twice, to a fourth engine."""

    @classmethod
    def short(cls) -> Self:
        """Two to four minutes: two followers of five families and two misses, once."""
        families = [Family(f.name, f.donor, f.followers[:2]) for f in FAMILIES[:5]]
        return cls(families, misses()[:2], 1, repeats=False)

    @property
    def steps(self) -> int:
        """How many prompts are sent, without those that are sent twice."""
        sent = sum(1 + len(family.followers) for family in self.families)
        return self.repetitions * (sent + len(self.misses))


class Session:
    """One run of the demo: engines, store, and what has been measured so far."""

    def __init__(self, workload: Workload, arms: dict[str, Engine], store: StoreView) -> None:
        self.workload = workload
        self.arms = arms
        self.store = store
        self.run = uuid.uuid4().hex[:8]
        self.results = Results(
            [FollowerResult(f.name) for f in workload.families for _ in f.followers],
            [{"full": [], "kvshare": []} for _ in workload.misses],
        )

    def warm_up(self, names: Sequence[str]) -> None:
        """Run every code path once with prompts that are not reported."""
        for name in names:
            salt = f"{self.run}-warm-up-{name}"
            self.ask_and_settle(name, WARM_UP.donor, salt, donor=True)
            for text in WARM_UP.followers:
                self.ask_and_settle(name, text, salt)

    def ask_and_settle(
        self, name: str, text: str, salt: str, *, donor: bool = False, chat: bool = True
    ) -> Answer:
        """Serve one prompt, and wait until the store has kept it if this engine uses the store."""
        if name in ("full", "prefix"):
            return self.arms[name].ask(text, salt, chat=chat)
        nodes = self.store.stats()["nodes"]
        answer = self.arms[name].ask(text, salt, chat=chat)
        if not self.store.settle(nodes, DONOR_KEPT_S if donor else KEPT_S) and donor:
            raise DemoError(f"the store has not kept a donor after {DONOR_KEPT_S} s")
        return answer

    def followers(self, repetition: int) -> Iterator[None]:
        """Serve every family once, donor first."""
        self.arms["prefix"].forget()
        salt = f"{self.run}-{repetition}"
        pending = iter(self.results.followers)
        for family in self.workload.families:
            for name in ("prefix", "kvshare"):
                self.ask_and_settle(name, family.donor, salt, donor=True)
            yield
            for turn, text in enumerate(family.followers):
                self.follower(next(pending), text, salt, repetition, turn)
                yield

    def follower(
        self, result: FollowerResult, text: str, salt: str, repetition: int, turn: int
    ) -> None:
        """Serve one follower on every engine, beginning with another one each time."""
        length = ANSWER_TOKENS if repetition == 0 else 1
        first = (repetition + turn) % len(COMPARED)
        for name in COMPARED[first:] + COMPARED[:first]:
            before = self.store.stats()
            answer = self.arms[name].ask(text, salt, length)
            result.add(name, answer)
            if name == "kvshare":
                self.store.settle(before["nodes"], KEPT_S)
                result.reuses.append(reuse_between(before, self.store.stats(), answer))

    def misses(self, repetition: int) -> Iterator[None]:
        """Serve the unrelated prompts with and without KVShare, next to the families' nodes."""
        salt = f"{self.run}-{repetition}"
        for turn, (text, times) in enumerate(
            zip(self.workload.misses, self.results.misses, strict=True)
        ):
            pair = ("full", "kvshare")
            for name in pair if (turn + repetition) % 2 else reversed(pair):
                times[name].append(self.ask_and_settle(name, text, salt, chat=False).ttft_s)
            yield

    def repeated(self) -> Iterator[None]:
        """Serve long donors twice where only KVShare can have kept them, and once without it."""
        for family in self.workload.families:
            times: Times = {"full": [], "again": []}
            for repetition in range(self.workload.repetitions):
                salt = f"{self.run}-{repetition}-repeated"
                full = self.ask_and_settle("full", family.donor, salt)
                if full.tokens < report.LONG:
                    break
                self.ask_and_settle("identical", family.donor, salt, donor=True)
                again = self.ask_and_settle("identical", family.donor, salt)
                times["full"].append(full.ttft_s)
                times["again"].append(again.ttft_s)
            if times["again"]:
                self.results.repeated.append(times)
            yield
