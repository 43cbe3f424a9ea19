"""The child process that makes text vectors: `python -m kvshare_store.lookup.embedding_process`.

Only this process loads an embedding model. It runs in the kernel's idle class, so it gets a core
only when nobody else wants it, and it ends with the process that started it. Frames both ways: four
bytes of length, then msgpack. A request is a `Wanted`; the answer is 384 float32, or empty for a
prompt without text.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

import msgspec
import numpy as np

from kvshare_store.lookup.embedders import SentenceEmbedder, TextEmbedder
from kvshare_store.lookup.text import decode
from kvshare_store.nodes.edits import Tokens

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """A prompt to embed. `tokens`: int32, native byte order."""

    tokenizer: str
    """A folder with `tokenizer.json`."""
    tokens: bytes


def framed(body: bytes) -> bytes:
    """One frame."""
    return _LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def serve(
    embedder: TextEmbedder,
    requests: BinaryIO,
    answers: BinaryIO,
    text_of: Callable[[str, Tokens], str | None] = decode,
) -> None:
    """Answer every request until there are no more."""
    decoder = msgspec.msgpack.Decoder(Wanted)
    while (body := read_frame(requests)) is not None:
        wanted = decoder.decode(body)
        text = text_of(wanted.tokenizer, np.frombuffer(wanted.tokens, np.int32))
        vector = embedder.embed(text) if text else None
        answers.write(framed(b"" if vector is None or not vector.any() else vector.tobytes()))
        answers.flush()


def end_with(parent: int) -> None:
    """End when the parent does, even while stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def run_when_idle() -> None:
    """Take a core only when nobody else wants it."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Requests and answers; an empty answer says that the process has begun and may be stopped.
    What a library prints goes to the log instead."""
    answers = os.fdopen(os.dup(1), "wb")
    answers.write(framed(b""))
    answers.flush()
    os.dup2(2, 1)
    return sys.stdin.buffer, answers


def main() -> None:
    """`embedding_process MODEL PARENT`: the model's name, and the process that must be there."""
    model, parent = sys.argv[1:]
    end_with(int(parent))
    run_when_idle()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they would fill the daemon's log
    requests, answers = private_streams()
    serve(SentenceEmbedder(model), requests, answers)


if __name__ == "__main__":
    main()
