"""The demo: similar prompts served by stock vLLM, with and without KVShare.

    python -m examples.demo.run [--model PATH] [--out demo-report.json] [--home DIR] [--full]

As it stands it takes up to four minutes on two cores: two followers of five families, each once.
`--full` serves every follower three times and measures misses and identical prompts as well.

Every follower of `families.py` is served by three engines with the same settings:

full      KVShare off, prefix caching off: every token is computed.
prefix    vLLM's prefix caching on: what is served today.
kvshare   KVShare with the policy `balanced`, and prefix caching on as well. That is what somebody
          gets who adds KVShare to a vLLM they run: the engine takes identical beginnings from its
          own cache and KVShare adds what it can to that. The report counts both kinds of identical
          beginning as `reused_exact`.

With `--full` a fourth engine, identical, has KVShare on and prefix caching off and is sent long
prompts twice.

How it is measured:

- Each engine has a process of its own, and they take turns: all of them are loaded, one works, the
  others sleep. So each follower is measured on all engines within seconds, in changing order, and a
  machine that gets slower or faster meanwhile does so for all of them.
- The time to first token is from handing token ids to the engine until the step that returns the
  first output token; lookup, load and edit are inside. Tokenising is not: it is the same for all.
- The measured request is always the first time that this prompt is sent in this repetition. Each
  repetition starts with an empty prefix cache and an empty KVShare namespace (a `cache_salt` of its
  own); donors are sent first, and saving them in the background is waited for. Times are medians
  of the repetitions, answers are those of the first one.
- Misses alternate between full and kvshare, so their ratio is of neighbours in time. They are sent
  without the chat template: the few tokens at its beginning would be a hit.
- Engines run in the measured process (no polling helper processes) and use all cores, which is the
  fastest that full prefill gets; with helper processes vLLM would by default also give an engine
  with a KV connector fewer cores than one without.
- Models run without torch.compile, which would take a minute for each engine. `--compile` turns it
  on for all of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Self

from rich.console import Console

from examples.demo import report
from examples.demo.progress import Bar, Lines, progress_of
from examples.demo.report import FollowerResult, Results, Reuse, Times
from examples.engines.engine import SETTINGS, Answer, Engine, kvshare_settings
from examples.engines.process import EngineError
from examples.engines.small_model import SmallModelError, prepare_model
from examples.prompts.families import FAMILIES, WARM_UP, Family, misses
from kvshare_store.errors import KVShareError

ANSWER_TOKENS = 32
REPETITIONS = 3
DONOR_KEPT_S = 30
"""Nothing can be measured without the donor in the store; a failure after this long."""
KEPT_S = 0.5
"""How long other prompts may take to become nodes. Some never do; nothing depends on them."""
COMPARED = ("full", "prefix", "kvshare")


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line that says why."""


def arm_settings(arm: str, home: str) -> dict[str, Any]:
    """What this arm's engine has beside the common settings."""
    caching = {"enable_prefix_caching": arm in ("prefix", "kvshare")}
    if arm in ("full", "prefix"):
        return caching
    return caching | kvshare_settings(home=home, policy="balanced")


# --- the store, from outside ----------------------------------------------------------------------


class StoreView:
    """What the daemon of the demo's home has counted."""

    def __init__(self, home: str) -> None:
        from kvshare_store.daemon.client import Client

        self._client = Client(home)

    def stats(self) -> dict[str, Any]:
        """All counters."""
        return self._client.stats()

    def settle(self, nodes: int, seconds: float) -> bool:
        """Wait for the store to have more than `nodes` nodes, all durable; False if it takes long.

        Not every prompt becomes a node: one whose every row is stored already does not.
        """
        deadline = time.monotonic() + seconds
        while self.stats()["nodes"] <= nodes:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        self._client.flush()
        return True

    def close(self) -> None:
        """Leave the daemon alone again."""
        self._client.close()


def reuse_between(before: dict[str, Any], after: dict[str, Any], answer: Answer) -> Reuse:
    """What became of one prompt's tokens, from the counters around it.

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


# --- the measurements -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is sent, and how often all of it."""

    families: Sequence[Family] = FAMILIES
    misses: Sequence[str] = misses()
    repetitions: int = REPETITIONS
    repeats: bool = True
    """Whether prompts are also sent twice, to a fourth engine."""

    @classmethod
    def short(cls) -> Self:
        """What fits into four minutes: two followers of five families and two misses, once."""
        families = [Family(f.name, f.donor, f.followers[:2]) for f in FAMILIES[:5]]
        return cls(families, misses()[:2], 1, repeats=False)

    @property
    def steps(self) -> int:
        """Prompts of one kind or another, for the progress bar."""
        sent = sum(1 + len(family.followers) for family in self.families)
        again = len(self.families) if self.repeats else 0
        return self.repetitions * (sent + len(self.misses)) + again


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


# --- the command ----------------------------------------------------------------------------------


class Demo:
    """Starts what is needed, measures, and cleans up after itself."""

    def __init__(self, options: argparse.Namespace, console: Console, log: IO[str]) -> None:
        self.options, self.console, self.log = options, console, log
        self.workload = Workload() if options.full else Workload.short()
        self.version = ""

    def run(self) -> Results:
        """All measurements."""
        with ExitStack() as stack:
            home = self.options.home or stack.enter_context(temporary_home())
            progress = stack.enter_context(progress_of(self.console))
            progress.says("Starting three engines, about a minute", None)
            full = stack.enter_context(self.start("full", home))
            with self.start("prefix", home) as prefix, self.start("kvshare", home) as ours:
                arms = {"full": full, "prefix": prefix, "kvshare": ours}
                self.version = max(arm.ready() for arm in arms.values())
                store = StoreView(home)
                stack.callback(store.close)
                session = Session(self.workload, arms, store)
                progress.says("Warming up", None)
                session.warm_up(COMPARED)
                progress.says("Serving prompts", self.workload.steps)
                for repetition in range(self.workload.repetitions):
                    for _ in chain(session.followers(repetition), session.misses(repetition)):
                        progress.advance()
            if self.workload.repeats:
                self.repeat(session, home, progress)
            session.results.errors = store.stats()["errors"]
        return session.results

    def repeat(self, session: Session, home: str, progress: Bar | Lines) -> None:
        """Send prompts twice to a fourth engine."""
        progress.says("Starting a fourth engine")
        with self.start("identical", home) as again:
            again.ready()
            session.arms["identical"] = again
            session.warm_up(["identical"])
            progress.says("Serving prompts again")
            for _ in session.repeated():
                progress.advance()

    def start(self, name: str, home: str) -> Engine:
        """Start one engine; it is not ready yet."""
        model = {"model": str(self.options.model), "enforce_eager": not self.options.compile}
        return Engine(name, SETTINGS | model | arm_settings(name, home), self.log)


@contextmanager
def temporary_home() -> Iterator[str]:
    """A store of the demo's own; its daemon ends with it."""
    with tempfile.TemporaryDirectory(prefix="kvshare-demo-") as home:
        try:
            yield home
        finally:
            command = [sys.executable, "-m", "kvshare_store.cli.main", "stop", "--home", home]
            subprocess.run(command, capture_output=True, check=False)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.run",
        description="Serve similar prompts with vLLM, with and without KVShare, and compare.",
    )
    parser.add_argument("--model", type=Path, help="a model folder (default: the demo's own)")
    parser.add_argument("--out", type=Path, default=Path("demo-report.json"), help="the report")
    parser.add_argument("--home", help="keep the store in this folder (default: a temporary one)")
    parser.add_argument("--full", action="store_true", help="all prompts, three times each")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status says whether the job worked."""
    options = parse_arguments(arguments)
    console = Console()
    log_path = options.out.with_suffix(".log")
    try:
        options.model = options.model or prepare_model()
        with log_path.open("w") as log:
            demo = Demo(options, console, log)
            results = demo.run()
    except (DemoError, EngineError, SmallModelError, KVShareError, OSError) as error:
        console.print(f"The demo did not work: {error}. Details: {log_path}", style="red")
        return 1
    made = report.build_report(f"vllm {demo.version}", options.model.name, results)
    options.out.write_text(json.dumps(made, indent=2) + "\n")
    report.show(made, results, console)
    found = report.problems(results)
    for problem in found:
        console.print(f"The demo did not work: {problem}. Details: {log_path}", style="red")
    console.print(f"Report: {options.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
