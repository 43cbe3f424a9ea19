"""The parent's end of the embedding process: one prompt at a time, stopped while others work."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import BinaryIO, cast

import msgspec
import numpy as np

from kvshare_store.errors import UnavailableError
from kvshare_store.lookup.embedding_process import Wanted, framed, read_frame
from kvshare_store.nodes.vectors import Vector

_PATIENCE_S = 2.0


class EmbeddingWorker:
    """Starts the process with the first prompt. `pause` and `resume` may be called from any thread,
    the rest from one."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command`: what to run; the id of this process is appended."""
        self._command = [*command, str(os.getpid())]
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent = memoryview(b"")
        self._paused = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return None if self._process is None else self._process.pid

    def ask(self, wanted: Wanted) -> None:
        """Begin with a prompt. It is sent while `answered` waits: a stopped process reads nothing,
        and nobody may wait for it."""
        if self._process is None:
            self._start()
        self._unsent = memoryview(framed(msgspec.msgpack.encode(wanted)))

    def answered(self, seconds: float) -> bool:
        """Whether the answer can be read after at most so many seconds; `UnavailableError` if the
        process has ended."""
        requests, answers = self._streams()
        readable, writable, _ = select.select(
            [answers], [requests] if self._unsent else [], [], seconds
        )
        if writable:
            try:
                self._unsent = self._unsent[os.write(requests.fileno(), self._unsent) :]
            except OSError as error:
                raise self._failed() from error
        return bool(readable)

    def answer(self) -> Vector | None:
        """What the model made of the prompt, unchecked; None for a prompt without text.
        `UnavailableError` if the process ended."""
        body = read_frame(self._streams()[1])
        if body is None:
            raise self._failed()
        if not body:
            return None
        return np.frombuffer(body[: len(body) // 4 * 4], np.float32)

    def pause(self) -> None:
        """Stop the process where it is."""
        self._signal(True)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(False)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_PATIENCE_S)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _start(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._lock:
            self._paused = False
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        os.set_blocking(self._streams()[0].fileno(), False)

    def _streams(self) -> tuple[BinaryIO, BinaryIO]:
        """Of requests and of answers."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise UnavailableError("no text is being embedded")
        return cast("BinaryIO", process.stdin), cast("BinaryIO", process.stdout)

    def _signal(self, pause: bool) -> None:
        with self._lock:
            if pause and self._paused:
                return
            self._paused = pause  # going on is said always: others can stop a process too
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGSTOP if pause else signal.SIGCONT)

    def _failed(self) -> UnavailableError:
        self.close()
        return UnavailableError("the process that embeds texts has ended; see the log")


def embedding_command(model: str) -> list[str]:
    """Runs the configured embedding model."""
    return [sys.executable, "-m", "kvshare_store.lookup.embedding_process", model]
