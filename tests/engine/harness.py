"""A real vLLM engine in the test's process, with KVShare in it and access to both of its sides."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
import torch._dynamo
from kvshare_connectors.vllm.beside import ours
from kvshare_connectors.vllm.metadata import LoadSpec
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.requests import RequestState
from kvshare_connectors.vllm.worker import Worker

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.plan import ReusePlan
from kvshare_store.plan.spans import Span, clip_spans
from tests.support.short_model import short_model

BLOCK = 32
PATIENCE_S = 60.0
"""Seconds to wait for a daemon on a busy machine."""
TOLERANCE = 5e-4
"""How far two fp32 computations of the same log-probability may differ. In 420 pairs of a prompt
alone and beside others they differed by up to 0.7e-4; wrong rows differ by 100e-4 and more."""

SHARED: dict[str, Any] = {
    "kvshare": {
        "policy": "aggressive",
        "http": "127.0.0.1:0",
        "source_key": "env:SOURCES_OF_TESTS",
    },
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}
WITH_DEVICE_TIER: dict[str, Any] = {"kvshare": {"policy": "aggressive", "device_bytes": "64MiB"}}
"""Settings of engines that several modules share (`SETTINGS = SHARED`)."""

Keep = list[tuple[int, int]]
"""Positions `start … stop-1` that a plan may reuse."""
Fresh = Callable[[int], list[int]]
"""Prompts of some length that have no run of tokens in common with any before."""


@dataclass
class Answer:
    """The answer to one request."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int = 0
    """Prompt tokens that vLLM counts as cached: from its own prefix cache or from the store."""
    said: dict[str, Any] = field(default_factory=dict)
    """What the answer says about reuse; field names without their prefix."""

    def agrees(self, other: Answer) -> bool:
        """Whether it has the same greedy tokens, and log-probabilities that agree up to fp32
        rounding. Of two tokens that are equally likely up to rounding, either may come; what
        follows is not compared then. Prints what differs."""
        pairs = zip(self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True)
        for at, (own, its, a, b) in enumerate(pairs):
            apart = _apart(a, b)
            if apart >= TOLERANCE or a.get(its, float("-inf")) < a[own] - TOLERANCE:
                print(f"token {at}: {own} and {its}, log-probabilities differ by {apart:.1e}")
                return False
            if own != its:
                return True
        return True

    def difference(self, other: Answer) -> float:
        """Largest difference of a log-probability that both report."""
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max((_apart(a, b) for a, b in pairs if a.keys() & b.keys()), default=float("inf"))


def _apart(a: dict[int, float], b: dict[int, float]) -> float:
    """Largest difference at one token; infinite if both report none in common."""
    return max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=float("inf"))


@dataclass
class Step:
    """What the scheduler gave the runner to do in one step."""

    tokens: int
    """Tokens computed in this step, including placeholder runs."""
    rows: int
    """Rows of the batch, including virtual ones."""
    runs: list[tuple[str, int, int]] = field(default_factory=list)
    """Virtual rows: id of the request, first position, length."""


@contextmanager
def scheduling_ahead() -> Iterator[None]:
    """Engines that are made inside the context schedule a step before they have the output of the
    last one, as on a GPU.

    vLLM switches that off on CPUs, where it gains nothing; its CPU runner can do it.
    """
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config

    def ahead(config: Any) -> None:
        configure(config)
        config.scheduler_config.async_scheduling = True

    with mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(ahead)):
        yield


def arguments(
    home: Path, kvshare: dict[str, Any], *, ahead: bool = False, **settings: Any
) -> dict[str, Any]:
    """Of `LLM` with KVShare."""
    extra = {
        "kvshare.home": str(home),
        "kvshare.semantic": "never",
        "kvshare.host_bytes": "512MiB",
        "kvshare.min_saving_ms": -1e9,  # whatever a busy machine has measured
        "kvshare.plan_deadline_ms": 10_000,
        "kvshare.idle_exit_s": 5,
    }
    extra |= {f"kvshare.{name}": value for name, value in kvshare.items()}
    scheduler = "KVShareAsyncScheduler" if ahead else "KVShareScheduler"
    defaults = {
        "model": str(short_model()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 128 << 20,
        "enable_prefix_caching": False,
        "max_logprobs": 50,
        "scheduler_cls": f"kvshare_connectors.vllm.{scheduler}",
        "kv_transfer_config": {
            "kv_connector": "KVShareConnector",
            "kv_connector_module_path": "kvshare_connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        },
    }
    return defaults | settings


class Engine:
    """`LLM` with KVShare, on a few layers of the small model if `settings` name no other. One at a
    time in a process; `close` it, unless it is a `kept_engine`.

    `ahead`: with asynchronous scheduling.
    """

    def __init__(
        self,
        home: Path,
        *,
        kvshare: dict[str, Any] | None = None,
        ahead: bool = False,
        **settings: Any,
    ) -> None:
        close_kept_engine()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["SOURCES_OF_TESTS"] = "ab" * 32
        # Threads that wait for each other are slow on a busy processor, and vLLM compiles an
        # operation of its sampler, which costs more here than it saves.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        torch.set_num_threads(1)
        torch._dynamo.config.disable = True
        from vllm import LLM

        self.home = home
        self._ids = itertools.count()
        self._answers: dict[str, list[Answer]] = {}
        with scheduling_ahead() if ahead else nullcontext():
            self.llm = LLM(**arguments(home, kvshare or {}, ahead=ahead, **settings))
        self.core = self.llm.llm_engine
        self.client = Client(home, timeout=PATIENCE_S)
        self.steps: list[Step] = []
        self._watch_steps()
        self.free_at_start = self.free_blocks

    def _watch_steps(self) -> None:
        schedule = self.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            scheduled = output.num_scheduled_tokens
            runs = [
                (new.req_id.split("/kvshare-")[0], new.num_computed_tokens, scheduled[new.req_id])
                for new in output.scheduled_new_reqs
                if "/kvshare-" in new.req_id
            ]
            self.steps.append(Step(sum(scheduled.values()), len(scheduled), runs))
            return output

        self.scheduler.schedule = watched

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, ours."""
        return self.core.engine_core.engine_core.scheduler

    @property
    def planning(self) -> Planning:
        """The connector's scheduler side."""
        return ours(self.scheduler.connector).planning

    @property
    def worker(self) -> Worker:
        """The connector's worker side."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return ours(get_kv_transfer_group())._worker

    @property
    def pool(self) -> Any:
        """vLLM's pool of paged blocks."""
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def free_blocks(self) -> int:
        """Paged blocks that no request holds."""
        return int(self.pool.get_num_free_blocks())

    @property
    def daemon(self) -> int:
        """Process id of the daemon."""
        return self.client.greet().pid

    def add(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 4,
        policy: str | None = None,
        params: dict[str, Any] | None = None,
        salt: str | None = None,
        lora: Any = None,
        trace_headers: dict[str, str] | None = None,
        **sampling: Any,
    ) -> str:
        """Queue a greedy request; returns its id. `params`: its whole `kv_transfer_params`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = f"request-{next(self._ids)}"
        params = {"kvshare.policy": policy} if policy else params
        extra = {"kv_transfer_params": params} if params is not None else None
        defaults = {
            "temperature": 0.0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "logprobs": 20,
            "output_kind": RequestOutputKind.FINAL_ONLY,  # otherwise `n` answers come one by one
        }
        wanted = SamplingParams(**(defaults | sampling), extra_args=extra)
        text: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            text["cache_salt"] = salt
        self.core.add_request(name, text, wanted, lora_request=lora, trace_headers=trace_headers)
        return name

    def abort(self, name: str) -> None:
        """Abort a request, as when its client disconnects."""
        self.core.abort_request([name])

    def step(self) -> Step:
        """One step of the engine; returns what was scheduled."""
        before = len(self.steps)
        self._finished(self.core.step())
        return self.steps[-1] if len(self.steps) > before else Step(0, 0)

    def drain(self, seconds: float = 120.0) -> dict[str, list[Answer]]:
        """Step until no request is left. Answers by request id, one for each of `n`."""
        deadline = time.monotonic() + seconds
        while self.core.has_unfinished_requests():
            assert time.monotonic() < deadline, "the engine makes no progress"
            self._finished(self.core.step())
        answers, self._answers = self._answers, {}
        return answers

    def _finished(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.finished:
                self._answers[output.request_id] = [_answer(d, output) for d in output.outputs]

    def ask(self, prompt: Sequence[int], **options: Any) -> Answer:
        """One request on its own."""
        name = self.add(prompt, **options)
        return self.drain()[name][0]

    def store(self, prompt: Sequence[int], **options: Any) -> Answer:
        """Serve one request, and wait until its rows are stored and durable."""
        answer = self.ask(prompt, **options)
        self.settle()
        return answer

    def run_out(self) -> None:
        """Run steps until everything is delivered that goes out with a later step."""
        self._finished(self.core.step())
        while self.core.engine_core.engine_core.batch_queue and not self.scheduler.running:
            self._finished(self.core.step())

    def settle(self) -> None:
        """Wait until the saver's queue is empty and the daemon has committed."""
        self.run_out()
        self.worker.saver.wait()
        self.client.flush()

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        self.run_out()
        assert self.scheduler.reset_prefix_cache()

    def clear(self) -> None:
        """Empty vLLM's own prefix cache and the store."""
        self.forget()
        self.settle()
        self.client.call(protocol.Clear())

    def stats(self) -> dict[str, Any]:
        """Counters of the daemon, once it has processed all messages."""
        self.settle()
        return self.client.stats()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """By how much the daemon's counters grow; filled at the end. Nested ones are
        `group.name`."""
        gained: Counter[str] = Counter()
        before = _flat(self.stats())
        yield gained
        after = _flat(self.stats())
        gained.update({name: count - before.get(name, 0) for name, count in after.items()})

    def check_idle(self) -> None:
        """Check that nothing is held: no request, no paged block, no plan, no lease."""
        stats = self.stats()
        assert not self.scheduler.requests
        assert self.free_blocks == self.free_at_start
        assert not self.planning.states
        assert not self.planning.runs.parked
        assert stats["leases"] == 0

    @contextmanager
    def budget(self, tokens: int | None = None, rows: int | None = None) -> Iterator[None]:
        """Limit the tokens and the rows of a step."""
        scheduler = self.scheduler
        names = ("max_num_scheduled_tokens", "max_num_running_reqs", "max_num_active_reqs")
        before = {name: getattr(scheduler, name) for name in names}
        wanted = dict(zip(names, (tokens, rows, rows), strict=True))
        for name in names:
            setattr(scheduler, name, wanted[name] or before[name])
        try:
            yield
        finally:
            for name in names:
                setattr(scheduler, name, before[name])

    @contextmanager
    def room(self, blocks: int) -> Iterator[None]:
        """Limit the number of free paged blocks."""
        taken = self.pool.get_new_blocks(self.free_blocks - blocks)
        try:
            yield
        finally:
            self.pool.free_blocks(taken)

    @contextmanager
    def keeping(self, keep: Keep | Callable[[int], Keep], noise: float = 50.0) -> Iterator[None]:
        """Plans of stored prompts may reuse `keep` only; all other positions first hold noise.

        `keep`: positions, or a function that gives them for the length of a prompt. Since the
        reused rows are the prompt's own, partial prefill must give full prefill's answer.
        """
        lookups, worker = self.planning.lookups, self.worker
        collect, load = lookups.collect, worker.load_one

        def fewer(state: RequestState, seconds: float) -> None:
            looked_up = state.looked_up
            collect(state, seconds)
            if state.plan is not None and not looked_up:
                parts = keep(state.length) if callable(keep) else keep
                state.plan = state.stored = _only(state.plan, parts)

        def noisy(spec: LoadSpec) -> int:
            own = torch.arange(spec.start, spec.plan.stop)
            size = worker.cache.block_size
            slots = torch.tensor(spec.block_ids)[own // size] * size + own % size
            rows = torch.randn(worker.cache.layout.shape(len(own))) * noise
            worker.cache.write(rows.to(torch.float32), slots)
            return load(spec)

        lookups.collect, worker.load_one = fewer, noisy
        try:
            yield
        finally:
            lookups.collect, worker.load_one = collect, load

    def close(self) -> None:
        """Stop engine and daemon and forget vLLM's globals."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

        self.core.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del self.llm, self.core
        cleanup_dist_env_and_memory()
        self.client.stop()
        self.client.close()


_kept: list[tuple[dict[str, Any], Engine]] = []


def kept_engine(homes: pytest.TempPathFactory, **settings: Any) -> Engine:
    """An engine that lives until another one is made, so that consecutive modules with the same
    settings share it."""
    if not _kept or _kept[0][0] != settings:
        engine = Engine(homes.mktemp("home"), **settings)
        _kept.append((settings, engine))
    return _kept[0][1]


def close_kept_engine() -> None:
    """Stop the shared engine, if there is one."""
    while _kept:
        _kept.pop()[1].close()


def random_runs(length: int, seed: int) -> Keep:
    """Runs that keep about half of the prompt, cut at random positions."""
    generator = random.Random(seed)
    cuts = sorted(generator.sample(range(1, length - 1), 2 * generator.randint(2, 12)))
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def half(length: int) -> Keep:
    """About half of the prompt, in runs of every length."""
    return random_runs(length, seed=3)


def _only(plan: ReusePlan, keep: Keep) -> ReusePlan:
    spans = [part for start, stop in keep for part in clip_spans(plan.spans, start, stop)]
    edited = tuple(Span(s.start, s.length, s.source, s.block, s.row, s.start == 0) for s in spans)
    return msgspec.structs.replace(plan, spans=edited, exact=0, generation=1)


def _flat(stats: dict[str, Any]) -> dict[str, int]:
    """Counters only; `{"declined": {"no_donor": 1}}` becomes `declined.no_donor`."""
    flat = {name: value for name, value in stats.items() if isinstance(value, int)}
    for group in ("declined", "errors"):
        flat |= {f"{group}.{name}": value for name, value in stats[group].items()}
    return flat


def _answer(one: Any, output: Any) -> Answer:
    """One of the `n` answers in a request's output."""
    said = output.kv_transfer_params or {}
    return Answer(
        list(one.token_ids),
        [{token: entry.logprob for token, entry in step.items()} for step in one.logprobs or []],
        output.num_cached_tokens or 0,
        {name.removeprefix("kvshare."): value for name, value in said.items()},
    )
