"""What counting costs a request: the time that the code of the metrics takes, beside the time to
first token.

Metrics cannot be switched off, and two engines differ by more than they could cost. So each
function that counts is timed where it runs: in the engine's process and, in all of its threads, in
the daemon.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.harness.counting import CountedDaemon, Stopwatch, watch_engine
from benchmarks.harness.engines import Arm, Home, engine_settings
from benchmarks.harness.models import model_folder, model_name, tokenizer_of
from benchmarks.harness.plots import LINES, cumulative
from benchmarks.harness.result import Cell, Options, Result
from benchmarks.latency.misses import prompts
from examples.engines.engine import Answer
from examples.engines.engine import serve as ask
from examples.engines.process import ENVIRONMENT
from kvshare_store.cli.progress import track
from kvshare_store.config import StoreConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET = 0.005
WARM = 6
NEW, EDITED = "new", "edited"


class Served(NamedTuple):
    """One request."""

    kind: str
    tokens: int
    reused: int
    ttft_s: float
    engine_s: float
    """Of that, in functions of the engine that count."""


class Asked:
    """An engine in this process, and how it is asked."""

    def __init__(self, options: Options, home: Home, watch: Stopwatch) -> None:
        os.environ.update(ENVIRONMENT)
        watch_engine(watch)
        import vllm

        arm = Arm(caching=True, kvshare=True, more={"disable_log_stats": False})
        self._llm = vllm.LLM(**engine_settings(str(model_folder(options)), arm, home))
        self._home, self._watch = home, watch

    def ask(self, kind: str, tokens: Sequence[int]) -> Served:
        """Serve a prompt, and wait until it is stored."""
        before, name = self._watch.seconds, uuid.uuid4().hex
        spent = [0.0]

        def first() -> None:
            spent[0] = self._watch.seconds - before

        answer: Answer = ask(self._llm, name, tokens, "all", 1, on_first=first)
        self._settle()
        return Served(kind, len(tokens), answer.report["kvshare.reused"], answer.ttft_s, spent[0])

    def close(self) -> None:
        """End the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _settle(self) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._llm.llm_engine.step()
        get_kv_transfer_group()._worker.saver.wait()
        self._llm.reset_prefix_cache()
        self._home.flush()


def edited(tokens: Sequence[int]) -> list[int]:
    """The prompt with four other tokens a quarter into it."""
    at = len(tokens) // 4
    return [*tokens[:at], *tokens[at + 4 : at + 8][::-1], *tokens[at + 4 :]]


class Phase(NamedTuple):
    """Requests of one kind, and what the daemon counted meanwhile."""

    served: list[Served]
    daemon_s: float
    calls: int

    @property
    def daemon_each(self) -> float:
        """Seconds a request."""
        return self.daemon_s / len(self.served)

    def share(self, one: Served) -> float:
        """What counting took of a request, as a share of its time to first token."""
        return (one.engine_s + self.daemon_each) / one.ttft_s


def measure(options: Options) -> Result:
    """Serve new prompts, then each again with an edit."""
    count = max(2, options.size(80, 12))
    sent = list(islice(prompts(options.data, tokenizer_of(options)), WARM + count))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="kvshare-bench-") as place:
        fields = {"semantic": "never", "min_saving_ms": -1e9, "idle_exit_s": 600.0}
        folder = f"{place}/home"
        daemon = CountedDaemon(StoreConfig(home=folder, **fields))
        with daemon.running(), closing(Asked(options, Home(folder, **fields), watch)) as engine:
            for tokens in sent[:WARM]:
                engine.ask("warm", tokens)
            phases = {
                NEW: _phase(engine, daemon, NEW, sent[WARM:]),
                EDITED: _phase(engine, daemon, EDITED, [edited(one) for one in sent[WARM:]]),
            }
    return result_of(phases, options, model_name(options))


def _phase(engine: Asked, daemon: CountedDaemon, kind: str, sent: list[list[int]]) -> Phase:
    seconds, calls = daemon.read()
    served = [engine.ask(kind, tokens) for tokens in track(sent, f"Serving {kind} prompts")]
    after, more = daemon.read()
    return Phase(served, after - seconds, more - calls)


def result_of(phases: dict[str, Phase], options: Options, model: str) -> Result:
    """The table."""
    shares = {name: [phase.share(one) for one in phase.served] for name, phase in phases.items()}
    worst = max(median(values) for values in shares.values())
    return Result(
        name="metrics",
        title="What counting costs: time in the code of metrics, beside the time to first token",
        n={f"{name} prompts": len(phase.served) for name, phase in phases.items()},
        seed=options.seed,
        model=model,
        noise_floor=f"a stopwatch around a function that does nothing: {1e6 * of_nothing():.2f} us "
        "a call",
        columns=["prompts", "n", "tokens", "reused", "ttft ms", "engine us", "daemon us",
                 "calls in the daemon", "share %", "largest share %"],
        rows=[row_of(name, phase, shares[name]) for name, phase in phases.items()],
        paper="not measured",
        notes=[
            "Medians. engine: before the first token, counting requests and tokens, what the "
            "connector reports each step, and Prometheus' counters of vLLM's own `/metrics`. "
            "daemon: everything that its threads count for a request, also after the token, when "
            "the prompt is stored; the mean over all.",
            "Share: engine and daemon, as if all of the daemon's were before the token. Scrapes "
            "are not in it: the daemon answers them in a thread that is nicer than those that "
            "plan, and `clients` measures plans beside a scrape a second.",
        ],
        targets=[
            (f"metrics ≤ {TARGET:.1%} of the time to first token, median",
             f"{worst:.3%}", worst <= TARGET),
        ],
        series={"shares": shares},
    )  # fmt: skip


def of_nothing(calls: int = 10_000) -> float:
    """What a stopwatch says of a function that does nothing, seconds a call."""

    class Idle:
        def nothing(self) -> None:
            pass

    watch, idle = Stopwatch(), Idle()
    watch.wrap(Idle, "nothing")
    for _ in range(calls):
        idle.nothing()
    return watch.seconds / calls


def row_of(name: str, phase: Phase, shares: list[float]) -> list[Cell]:
    """One kind of prompts."""
    served = phase.served
    return [
        name, len(served), round(median(one.tokens for one in served)),
        round(median(one.reused for one in served)),
        1e3 * median(one.ttft_s for one in served), 1e6 * median(one.engine_s for one in served),
        1e6 * phase.daemon_each, phase.calls / len(served), 100 * median(shares), 100 * max(shares),
    ]  # fmt: skip


def draw(made: Result) -> Figure:
    """Share of requests by the share that counting takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for (name, shares), (style, _) in zip(made.series["shares"].items(), LINES, strict=False):
        cumulative(axes, [100 * share for share in shares], style, label=name)
    axes.axvline(100 * TARGET, color="grey", linewidth=0.8)
    axes.set(xlabel="counting, % of the time to first token", ylabel="share of requests")
    axes.set_xlim(left=0)
    axes.legend()
    return figure
