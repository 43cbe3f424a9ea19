"""KVShare's schedulers as vLLM makes them, without engine, weights or daemon.

`Bench` plays the parts around a scheduler: requests arrive, steps are not really computed, and
every request samples the same token. Plans come from a `FakeLink`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from kvshare_connectors.vllm.planning import Planning
from kvshare_connectors.vllm.requests import granted

from kvshare_store.daemon import protocol
from kvshare_store.errors import DeadlineError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import BlockRef, ReusePlan
from kvshare_store.plan.spans import Span
from kvshare_store.save.second_looks import Look
from kvshare_store.tensors.layout import KVLayout
from tests.engine.harness import BLOCK, scheduling_ahead

LENGTH = 100
NAMESPACE = Namespace(model="m", layout=KVLayout(2, 1, 8, "float32"))
PLAN = ReusePlan(
    namespace=NAMESPACE.digest,
    tokens=LENGTH,
    exact=40,
    spans=(Span(0, 40, 0, 0, 0, True), Span(50, 30, 52, 0, 52)),
    blocks=(BlockRef("ab" * 32, 128, 4096, 0),),
    donors=("d",),
    generation=1,
    lease="lease",
    saving_ms=10.0,
)
"""Forty exact tokens, ten placeholders, thirty edited tokens, and a tail of twenty."""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 1 << 18,
}


class FakeLink:
    """Answers every lookup with `plan`, after `late` further questions."""

    def __init__(self) -> None:
        self.plan: ReusePlan | None = PLAN
        self.policy = "aggressive"
        """The daemon's own policy; it never grants a laxer one."""
        self.late = 0
        self.asked: list[tuple[str, str | None]] = []
        self.pools: list[tuple[str, ...]] = []
        """Of each question."""
        self.sources: list[bytes] = []
        self.asked_for_looks = 0
        self.told: list[Any] = []
        self.busy: list[bool] = []
        self.given_up = 0
        self.looks: list[Look] = []
        """What is given to an idle engine, one after the other."""

    def question(self, message: Any) -> bytes:
        self.told.append(message)
        return b"question"

    def reply(self, request_id: bytes, seconds: float) -> Any:
        return (
            msgspec.to_builtins(self.looks.pop(0), builtin_types=(bytes,)) if self.looks else None
        )

    def ask(self, question: protocol.Plan) -> bytes | None:
        self.asked.append((question.namespace.digest, question.policy))
        self.pools.append(question.pools)
        self.sources.append(question.source)
        self.asked_for_looks += question.look
        return b"%d" % len(self.asked)

    def answer(self, request_id: bytes, seconds: float) -> ReusePlan | None:
        if self.late > 0:
            self.late -= 1
            raise DeadlineError("not yet")
        if self.plan is None:
            return None
        policy = granted(self.policy, self.asked[int(request_id) - 1][1])
        return msgspec.structs.replace(self.plan, policy=policy)

    def give_up(self, request_id: bytes) -> None:
        self.given_up += 1

    def tell(self, message: Any) -> bool:
        self.told.append(message)
        return True

    def working(self, busy: bool) -> None:
        if busy != (self.busy or [False])[-1]:
            self.busy.append(busy)

    def close(self) -> None:
        pass


def tiny_model(folder: Path, **fields: Any) -> Path:
    """The configuration of a tiny model, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | fields))
    return folder


def kvshare_alone(home: Path, failures: str = "recompute", **settings: Any) -> dict[str, Any]:
    """KVShare's part of `--kv-transfer-config`; `settings` are KVShare's own."""
    extra = {"home": str(home), "semantic": "never", "min_saving_ms": 0.0} | settings
    return {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": "kvshare_connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": failures,
        "kv_connector_extra_config": {f"kvshare.{name}": value for name, value in extra.items()},
    }


class Bench:
    """A scheduler, with what vLLM's engine does around it. `open_link` must be patched."""

    def __init__(
        self,
        model: Path,
        transfer: dict[str, Any],
        *,
        ahead: bool = False,
        blocks: int = 512,
        lora: int = 0,
        stock: bool = False,
        **scheduling: Any,
    ) -> None:
        """`ahead`: with asynchronous scheduling; `lora`: max_loras; `stock`: vLLM's own
        scheduler."""
        from kvshare_connectors.vllm import KVShareAsyncScheduler, KVShareScheduler
        from vllm.config import (
            CacheConfig,
            KVTransferConfig,
            LoRAConfig,
            ModelConfig,
            SchedulerConfig,
            VllmConfig,
        )
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        limits = {
            "max_num_seqs": 8, "max_num_batched_tokens": 512, "max_model_len": 1 << 17,
            "is_encoder_decoder": False, "async_scheduling": ahead,
        }  # fmt: skip
        with scheduling_ahead() if ahead else nullcontext():
            config = VllmConfig(
                model_config=ModelConfig(
                    model=str(model), tokenizer=str(model), skip_tokenizer_init=True,
                    dtype="float32",
                ),
                cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
                scheduler_config=SchedulerConfig(**(limits | scheduling)),
                kv_transfer_config=KVTransferConfig(**transfer),
                lora_config=LoRAConfig(max_loras=lora) if lora else None,
            )  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32
        )
        caches = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["0", "1"], spec)])
        plain = Scheduler if stock else KVShareScheduler
        self.scheduler: Any = (KVShareAsyncScheduler if ahead else plain)(
            config, caches, StructuredOutputManager(config), BLOCK, log_stats=True
        )
        self._ids = itertools.count()
        self.answers: dict[str, Any] = {}
        """The last output of each finished request."""
        self.probable: Any = None
        """What the runner says of whoever asks for `prompt_logprobs`."""

    @property
    def planning(self) -> Planning:
        """KVShare's scheduler side."""
        from kvshare_connectors.vllm.beside import ours

        connector = ours(self.scheduler.connector)
        assert connector is not None
        assert connector.planning is not None
        return connector.planning

    def add(
        self,
        prompt: Sequence[int] = range(LENGTH),
        *,
        max_tokens: int = 2,
        lora: Any = None,
        params: dict[str, Any] | None = None,
        resumable: bool = False,
    ) -> Any:
        """A request, as the scheduler keeps it."""
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={"kv_transfer_params": params}
        )
        sampling.update_from_generation_config({}, eos_token_id=1)
        request = Request(
            request_id=f"request-{next(self._ids)}",
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            lora_request=lora,
            resumable=resumable,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Any:
        """Schedule the next step."""
        return self.scheduler.schedule()

    def finish(self, output: Any, invalid: set[int] | None = None) -> None:
        """Report a step as computed: every complete request has sampled a token."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            done = request is not None and not request.is_prefill_chunk
            sampled.append([7] if done else [])
        loaded = {name for part in _parts(output) for name in part.finished_loads}
        results = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={
                    new.req_id: self.probable
                    for new in output.scheduled_new_reqs
                    if new.sampling_params.prompt_logprobs is not None
                },
                pooler_output=None,
                kv_connector_output=KVConnectorOutput(
                    finished_recving=loaded or None, invalid_block_ids=invalid or set()
                ),
            ),
        )
        for result in results.values():
            for answer in result.outputs:
                if answer.finish_reason is not None:
                    self.answers[answer.request_id] = answer
        self.stats = next((r.scheduler_stats for r in results.values() if r.scheduler_stats), None)

    def step(self, invalid: set[int] | None = None) -> Any:
        """Schedule one step and report it as computed; returns what was scheduled."""
        output = self.schedule()
        self.finish(output, invalid)
        return output

    def drain(self, steps: int = 50) -> None:
        """Step until every request has ended."""
        for _ in range(steps):
            if not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def runs_of(output: Any) -> list[tuple[str, int, int]]:
    """Virtual rows of a step: id of the request, first position, length."""
    return [
        (new.req_id.split("/kvshare-")[0], new.num_computed_tokens,
         output.num_scheduled_tokens[new.req_id])
        for new in output.scheduled_new_reqs
        if "/kvshare-" in new.req_id
    ]  # fmt: skip


def _parts(output: Any) -> list[Any]:
    metadata = output.kv_connector_metadata
    parts = getattr(metadata, "metadata", None)
    found = [metadata] if parts is None else list(parts)
    return [part for part in found if hasattr(part, "finished_loads")]
