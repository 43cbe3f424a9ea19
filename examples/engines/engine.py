"""A vLLM engine in a process of its own, with or without KVShare.

    python -m examples.engines.engine SETTINGS

is that process. `SETTINGS` is JSON: the arguments of `vllm.LLM`. `Engine` is the caller's side.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

from examples.engines.process import EngineError, EngineProcess, answer_commands

if TYPE_CHECKING:
    from vllm import LLM

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "block_size": 32,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 512 << 20,
    "seed": 0,
}
"""Arguments of `vllm.LLM` that suit the small model."""


@dataclass(frozen=True)
class Answer:
    """How one engine answered one prompt."""

    ttft_s: float
    tokens: int
    """Tokens of the prompt."""
    cached: int
    """Tokens of the prompt that the engine itself says it did not compute."""
    token_ids: list[int]
    """The answer."""
    text: str
    report: dict[str, Any] = field(default_factory=dict)
    """What KVShare says of the prompt (`kv_transfer_params`); empty without KVShare."""

    @property
    def computed(self) -> int:
        """Tokens of the prompt that the engine computed."""
        return computed(self.tokens, self.cached, self.report)


def computed(tokens: int, cached: int, report: Mapping[str, Any]) -> int:
    """Tokens of a prompt that were computed: KVShare says so itself, others count what was cached.

    vLLM's own count knows nothing of rows that are reused behind a change.
    """
    return int(report.get("kvshare.recomputed", tokens - cached))


def kvshare_settings(**store: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that turn KVShare on, with these settings of the store."""
    transfer = {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": "kvshare_connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {f"kvshare.{name}": value for name, value in store.items()},
    }
    scheduler = "kvshare_connectors.vllm.KVShareScheduler"
    return {"kv_transfer_config": transfer, "scheduler_cls": scheduler}


class Engine(EngineProcess):
    """An engine in a process of its own."""

    def __init__(self, name: str, settings: dict[str, Any], log: IO[str]) -> None:
        """`settings` are the arguments of `vllm.LLM`."""
        command = [sys.executable, "-m", "examples.engines.engine", json.dumps(settings)]
        super().__init__(name, command, log)

    def ask(self, text: str, salt: str, max_tokens: int = 1, *, chat: bool = True) -> Answer:
        """Answer one prompt: the plain text, or the text as the one message of a chat."""
        asked = {"text": text, "salt": salt, "max_tokens": max_tokens, "chat": chat}
        return Answer(**self._do("ask", **asked))

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        self._do("forget")


class Commands:
    """The commands of the process."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        self._served = 0

    def ask(self, text: str, salt: str, max_tokens: int, chat: bool) -> dict[str, Any]:
        """Serve one prompt: an `Answer`."""
        self._served += 1
        tokens = tokens_of(self._llm, text, chat)
        return asdict(serve(self._llm, f"ask-{self._served}", tokens, salt, max_tokens))

    def forget(self) -> bool:
        """Empty the engine's own prefix cache."""
        return bool(self._llm.reset_prefix_cache())


def serve(
    llm: "LLM",
    request_id: str,
    tokens: Sequence[int],
    salt: str,
    max_tokens: int,
    *,
    policy: str | None = None,
    source: str = "",
    on_first: Callable[[], None] = lambda: None,
) -> Answer:
    """Serve these tokens greedily; the clock runs from handing them over to the first token.

    `policy` is what the request asks of KVShare, `source` who sends it; `on_first` is called when
    the clock has stopped.
    """
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    prompt = TokensPrompt(prompt_token_ids=list(tokens))
    if salt:
        prompt["cache_salt"] = salt
    said = {"kvshare.policy": policy, "kvshare.source": source}
    asked = {name: value for name, value in said.items() if value}
    extra = {"kv_transfer_params": asked} if asked else None
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=extra)
    first: float | None = None
    output: Any = None
    began = time.perf_counter()
    engine.add_request(request_id, prompt, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - began
                on_first()
    engine.step()  # one more, as a server's loop does: the engine tidies up after the request
    if first is None or output is None:
        raise EngineError("the engine gave no token")
    completion = output.outputs[0]
    cached = output.num_cached_tokens or 0
    report = output.kv_transfer_params or {}
    return Answer(first, len(tokens), cached, list(completion.token_ids), completion.text, report)


def tokens_of(llm: "LLM", text: str, chat: bool) -> list[int]:
    """The tokens of the text, or of a chat with this one message."""
    tokenizer: Any = llm.get_tokenizer()
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def start() -> tuple[str, Commands]:
    """Start the engine that the command line asks for."""
    import vllm

    return vllm.__version__, Commands(vllm.LLM(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    answer_commands(start)
