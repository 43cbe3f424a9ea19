"""One vLLM engine of the demo, in a process of its own that takes turns with the others.

    python -m examples.demo.engine --arm full|prefix|kvshare|identical --model PATH --home DIR

reads commands from stdin, a line of JSON each, answers each with a line on stdout, and ends when
stdin closes. `Arm` is the other side of that.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from examples.demo.report import Answer

if TYPE_CHECKING:
    from vllm import LLM

PATIENCE_S = 600
"""An engine that is silent for longer has hung."""

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "block_size": 32,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 512 << 20,
    "seed": 0,
}
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # Threads that wait for each other sleep instead of spinning: then whatever else the machine
    # does slows an engine down by its share, and not many times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line that says why."""


# --- inside ---------------------------------------------------------------------------------------


def arm_settings(arm: str, home: str) -> dict[str, Any]:
    """What this arm's engine has beside the common settings."""
    caching = {"enable_prefix_caching": arm in ("prefix", "kvshare")}
    if arm in ("full", "prefix"):
        return caching
    return caching | kvshare_settings(home=home, policy="balanced")


def kvshare_settings(**store: Any) -> dict[str, Any]:
    """What turns KVShare on in a vLLM engine, with these settings of the store."""
    transfer = {
        "kv_connector": "KVShareConnector",
        "kv_connector_module_path": "kvshare_connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {f"kvshare.{name}": value for name, value in store.items()},
    }
    scheduler = "kvshare_connectors.vllm.KVShareScheduler"
    return {"kv_transfer_config": transfer, "scheduler_cls": scheduler}


def serve_arm(options: argparse.Namespace) -> None:
    """Start one engine and answer the commands on stdin, a line of JSON each, until it closes."""
    replies = take_stdout()
    import vllm

    llm = vllm.LLM(
        model=str(options.model),
        enforce_eager=not options.compile,
        **SETTINGS,
        **arm_settings(options.arm, options.home),
    )
    send(replies, {"version": vllm.__version__})
    for number, line in enumerate(sys.stdin):
        command = json.loads(line)
        if command.pop("forget", False):
            send(replies, {"forgotten": llm.reset_prefix_cache()})
        else:
            send(replies, asdict(answer(llm, str(number), **command)))


def take_stdout() -> IO[str]:
    """Keep stdout for replies; whatever else is printed goes where the log goes."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def send(stream: IO[str], message: dict[str, Any]) -> None:
    """Write one line of JSON."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def answer(
    llm: "LLM", request_id: str, text: str, salt: str, max_tokens: int, chat: bool
) -> Answer:
    """Serve one prompt greedily."""
    return serve(llm, request_id, tokens_of(llm, text, chat), salt, max_tokens)


def serve(
    llm: "LLM",
    request_id: str,
    tokens: Sequence[int],
    salt: str,
    max_tokens: int,
    *,
    policy: str | None = None,
    on_first: Callable[[], None] = lambda: None,
) -> Answer:
    """Serve these tokens greedily; the clock runs from handing them over to the first token.

    `policy` is what the request asks of KVShare; `on_first` is called when the clock has stopped.
    """
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    prompt = TokensPrompt(prompt_token_ids=list(tokens))
    if salt:
        prompt["cache_salt"] = salt
    extra = {"kv_transfer_params": {"kvshare.policy": policy}} if policy else None
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
        raise DemoError("the engine gave no token")
    completion = output.outputs[0]
    cached = output.num_cached_tokens or 0
    return Answer(first, len(tokens), cached, list(completion.token_ids), completion.text)


def tokens_of(llm: "LLM", text: str, chat: bool) -> list[int]:
    """The tokens of the text, or of a chat with this one message."""
    tokenizer: Any = llm.get_tokenizer()
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- outside --------------------------------------------------------------------------------------


class EngineProcess:
    """A process that runs one engine: takes lines of JSON and answers each with one."""

    def __init__(self, name: str, command: Sequence[str], log: IO[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | ENGINE_ENVIRONMENT,
        )

    def ready(self) -> str:
        """Wait until the engine has started; its version."""
        return str(self._receive()["version"])

    def _call(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, command)
        except BrokenPipeError:
            raise DemoError(f"the engine {self.name!r} has stopped") from None
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        heard, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        line = self._process.stdout.readline() if heard else ""
        if not line:
            raise DemoError(f"the engine {self.name!r} has stopped")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the engine; closing its stdin is the sign."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Arm(EngineProcess):
    """One engine of the demo from outside: takes prompts and gives answers."""

    def __init__(
        self, name: str, model: Path, home: str, log: IO[str], *, compiled: bool = False
    ) -> None:
        command = [sys.executable, "-m", "examples.demo.engine", "--arm", name]
        command += ["--model", str(model), "--home", home]
        super().__init__(name, command + ["--compile"] * compiled, log)

    def ask(self, text: str, salt: str, max_tokens: int = 1, *, chat: bool = True) -> Answer:
        """Have one prompt answered."""
        command = {"text": text, "salt": salt, "max_tokens": max_tokens, "chat": chat}
        return Answer(**self._call(command))

    def forget(self) -> None:
        """Empty the engine's own prefix cache."""
        self._call({"forget": True})


def parse_arguments() -> argparse.Namespace:
    """The command line that `Arm` writes."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo.engine")
    parser.add_argument("--arm", required=True, choices=("full", "prefix", "kvshare", "identical"))
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--home", required=True)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    serve_arm(parse_arguments())
