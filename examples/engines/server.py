"""`vllm serve` in a process of its own, with or without KVShare, asked through the OpenAI API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from examples.engines.engine import SETTINGS, computed
from examples.engines.process import ENVIRONMENT, PATIENCE_S, EngineError, wait_or_kill

_STOP_S = 60
_LINE_S = 5.0
"""Longest wait for the line that KVShare logs of a request."""
_NAME = "served"
_MODULE = "kvshare_store.cli.main"


@dataclass(frozen=True)
class Streamed:
    """How a server answered a chat, seen from the client."""

    ttft_s: float
    """Seconds from sending the request to the first word of the answer."""
    tokens: int
    """Tokens of the prompt."""
    computed: int
    """Tokens of the prompt that the engine computed."""
    text: str
    report: dict[str, str]
    """What KVShare says of the prompt; empty without KVShare."""


def arguments(model: Path, store: dict[str, Any] | None) -> list[str]:
    """The command of a server for this model, without its port.

    `store`: settings of KVShare; None: vLLM alone. Everything else is the same for both.
    """
    flags = [
        part
        for name, value in SETTINGS.items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]
    more = ["--enforce-eager", "--served-model-name", _NAME, "--enable-prompt-tokens-details"]
    vllm = ["serve", str(model), *flags, *more]
    if store is not None:
        ours = [part for name, value in store.items() for part in (f"--kvshare.{name}", str(value))]
        return [sys.executable, "-m", _MODULE, "vllm", *vllm, *ours]
    from kvshare_connectors.vllm.launch import command_line, has_cli

    return command_line(vllm, cli=has_cli())


def free_port() -> int:
    """A port of this machine that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client:
    """A client of a server's OpenAI API."""

    def __init__(
        self, name: str, port: int, model: str = _NAME, reports: Path | None = None
    ) -> None:
        """`name` of the server in messages; `model` is the name that it serves. `reports`: where
        a server with KVShare and `log_requests` logs, since a stream has no place for a report."""
        self.name, self.port = name, port
        self._model, self._reports = model, reports

    def ask(self, messages: Sequence[dict[str, str]], salt: str, max_tokens: int = 1) -> Streamed:
        """Have a chat continued greedily, as a stream; `EngineError` if the server refuses."""
        body = {
            "model": self._model,
            "messages": list(messages),
            "cache_salt": salt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            self._url("v1/chat/completions"),
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as stream:
                return self._received(stream, began)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise EngineError(f"the server {self.name!r} refused a request: {said}") from error
        except OSError as error:
            raise EngineError(f"the server {self.name!r} does not answer: {error}") from error

    def _received(self, stream: Iterable[bytes], began: float) -> Streamed:
        first: float | None = None
        words, usage, name = [], {}, ""
        for part in _parts(stream):
            name = part.get("id", name)
            usage = part.get("usage") or usage
            for choice in part.get("choices", ()):
                if word := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    words.append(word)
        if first is None:
            raise EngineError(f"the server {self.name!r} gave no word")
        tokens = int(usage["prompt_tokens"])
        cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        report = logged(self._reports, name) if self._reports else {}
        return Streamed(first, tokens, computed(tokens, cached, report), "".join(words), report)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"


class Server(Client):
    """A server and its client. It is started at once and ends with its context."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, kvshare: bool = False
    ) -> None:
        """Run `command`, which takes `--host` and `--port`; what it prints goes to `log`."""
        super().__init__(name, free_port(), reports=log if kvshare else None)
        environment = os.environ | ENVIRONMENT
        # the engine has a process of its own, and uses all cores with and without a connector
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *listen], stdout=output, stderr=output, env=environment
            )

    def ready(self) -> None:
        """Wait until the server answers; `EngineError` if it ends or takes too long."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineError(f"the server {self.name!r} has stopped")
            try:
                urllib.request.urlopen(self._url("health"), timeout=2).close()
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
            else:
                return
        raise EngineError(f"the server {self.name!r} has not started in {PATIENCE_S} s")

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        wait_or_kill(self._process, _STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def logged(log: Path, request: str) -> dict[str, str]:
    """What KVShare logged of a request; `EngineError` if nothing."""
    deadline = time.monotonic() + _LINE_S
    while time.monotonic() < deadline:
        for line in reversed(log.read_text(errors="replace").splitlines()):
            _, found, said = line.partition(f"kvshare: request {request}")
            if found:
                pairs = (word.partition("=") for word in said.partition(": ")[2].split())
                return {f"kvshare.{field}": value for field, _, value in pairs}
        time.sleep(0.02)
    raise EngineError(f"{log} has no line of the request {request}: is `log_requests` on?")


def _parts(stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The messages of a stream of server-sent events."""
    for line in stream:
        field, _, data = line.decode().strip().partition(": ")
        if field == "data" and data != "[DONE]":
            yield json.loads(data)
