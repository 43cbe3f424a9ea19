"""A vLLM engine with LMCache's connector, for one test: a process of its own.

    python -m tests.connectors.lmcache.inside.lmcache_engine PORT SALT [SALT]...

It serves one prompt for each salt and writes a line of JSON for each: `salt`, `cached` (prompt
tokens that vLLM did not compute), `tokens` (the answer).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness.engine_process import guard_dispatcher
from benchmarks.peers.lmcache import lmcache_settings
from tests.support.short_model import short_model

LENGTH = 700
"""Tokens of the prompt: five chunks and a part of one."""


def main(port: int, salts: Sequence[str]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    guard_dispatcher()
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True  # vLLM compiles an operation of its sampler: seconds
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(short_model()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=128 << 20,
        **lmcache_settings(port),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompt = [1000 + 7 * at % 20_000 for at in range(LENGTH)]
    for salt in salts:
        text = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = llm.generate([text], sampling, use_tqdm=False)  # type: ignore[list-item]
        tokens = list(output.outputs[0].token_ids)
        line = {"salt": salt, "cached": output.num_cached_tokens, "tokens": tokens}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
