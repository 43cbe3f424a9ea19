"""The demo: similar prompts served by stock vLLM, with and without KVShare.

    python -m examples.demo.run [--model PATH] [--out demo-report.json] [--home DIR] [--full]

As it stands it takes two to four minutes on two cores: two followers of five families, each once.
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
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from examples.demo import report
from examples.demo.report import POLICY, Results
from examples.demo.session import COMPARED, DemoError, Session, Workload
from examples.demo.terminal import show
from examples.engines.engine import SETTINGS, Engine, kvshare_settings
from examples.engines.process import EngineError
from examples.engines.small_model import SmallModelError, prepare_model
from examples.engines.store import StoreView, temporary_home
from kvshare_store.cli.progress import track
from kvshare_store.errors import KVShareError


def arm_settings(arm: str, home: str) -> dict[str, Any]:
    """The settings of this arm's engine, beside the common ones."""
    caching = {"enable_prefix_caching": arm in ("prefix", "kvshare")}
    if arm in ("full", "prefix"):
        return caching
    return caching | kvshare_settings(home=home, policy=POLICY)


def served(session: Session) -> Iterator[None]:
    """Each prompt of all repetitions, once it is served."""
    for repetition in range(session.workload.repetitions):
        yield from session.followers(repetition)
        yield from session.misses(repetition)


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
            self.console.print("Starting three engines, about a minute ...")
            full = stack.enter_context(self.start("full", home))
            with self.start("prefix", home) as prefix, self.start("kvshare", home) as ours:
                arms = {"full": full, "prefix": prefix, "kvshare": ours}
                self.version = max(arm.ready() for arm in arms.values())
                store = StoreView(home)
                stack.callback(store.close)
                session = Session(self.workload, arms, store)
                self.console.print("Warming up ...")
                session.warm_up(COMPARED)
                for _ in track(served(session), "Serving prompts", self.workload.steps):
                    pass
            if self.workload.repeats:
                self.repeat(session, home)
            session.results.errors = store.stats()["errors"]
        return session.results

    def repeat(self, session: Session, home: str) -> None:
        """Send prompts twice to a fourth engine."""
        self.console.print("Starting a fourth engine ...")
        with self.start("identical", home) as again:
            again.ready()
            session.arms["identical"] = again
            session.warm_up(["identical"])
            families = len(self.workload.families)
            for _ in track(session.repeated(), "Serving prompts again", families):
                pass

    def start(self, name: str, home: str) -> Engine:
        """Start one engine; it is not ready yet."""
        model = {"model": str(self.options.model), "enforce_eager": not self.options.compile}
        return Engine(name, SETTINGS | model | arm_settings(name, home), self.log)


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
    show(made, results, console)
    found = report.problems(results)
    for problem in found:
        console.print(f"The demo did not work: {problem}. Details: {log_path}", style="red")
    console.print(f"Report: {options.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
