"""A process that runs an engine. Each command and each answer is a line of JSON.

`EngineProcess` is the side of the caller, `answer_commands` the side of the process.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, Self

PATIENCE_S = 600
"""An engine that is silent for longer has hung."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # Threads that wait for each other sleep instead of spinning: then whatever else the machine
    # does slows an engine down by its share, and not many times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class EngineError(RuntimeError):
    """An engine, or what it needs, does not work; the message says what has happened."""


class EngineProcess:
    """The caller's side of a process that runs one engine."""

    def __init__(self, name: str, command: Sequence[str], log: IO[str]) -> None:
        """Start `command`; what it prints to stderr goes to `log`."""
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ready(self) -> str:
        """Wait until the engine has started; vLLM's version."""
        return str(self._receive()["version"])

    def _do(self, name: str, **arguments: Any) -> Any:
        """Have the process run one of its commands; `EngineError` if it has stopped."""
        assert self._process.stdin is not None
        try:
            _send(self._process.stdin, {"do": name, **arguments})
        except BrokenPipeError:
            raise EngineError(f"the engine {self.name!r} has stopped") from None
        return self._receive()["result"]

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        heard, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        line = self._process.stdout.readline() if heard else ""
        if not line:
            raise EngineError(f"the engine {self.name!r} has stopped")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the engine: closing its stdin is the sign."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        wait_or_kill(self._process, 30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_or_kill(process: subprocess.Popen[Any], seconds: float) -> None:
    """Wait for a process that was told to end, and end it if it has not after so long."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answer_commands(start: Callable[[], tuple[str, object]]) -> None:
    """Start an engine and answer commands from stdin until it closes.

    `start` returns vLLM's version and an object whose methods are the commands. Whatever else is
    printed to stdout goes to stderr.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    version, commands = start()
    _send(replies, {"version": version})
    for line in sys.stdin:
        command = json.loads(line)
        _send(replies, {"result": getattr(commands, command.pop("do"))(**command)})


def _send(stream: IO[str], message: dict[str, Any]) -> None:
    """Write one line of JSON."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()
