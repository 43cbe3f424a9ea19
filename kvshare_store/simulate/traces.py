"""Traces as requests. A request is a chain of named runs of tokens; equal names mean equal
prefixes."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import blake3
import msgspec
import numpy as np

from kvshare_store.config import json_lines
from kvshare_store.errors import ConfigError, UnsupportedError
from kvshare_store.nodes.edits import Tokens

HASHED_TOKENS = 512
"""Tokens of one of the `hash_ids`."""
_BETWEEN_TURNS = 100.0
"""How many other conversations begin, on average, between two turns of one."""

Tokenize = Callable[[str], Sequence[int]]


class Chunk(NamedTuple):
    """A run of a prompt's tokens, named by everything up to its end."""

    name: str
    tokens: int


Request = tuple[Chunk, ...]


class _Line(msgspec.Struct):
    """What a line of a trace may hold; other fields are ignored."""

    hash_ids: list[int | str] | None = None
    input_length: int | None = None
    tokens: list[int] | None = None
    human: list[str] | None = None


def requests(file: IO[bytes], block_tokens: int, tokenize: Tokenize | None) -> Iterator[Request]:
    """The requests of a JSONL file (gzip or not) in order, read as they are needed.

    A line has `hash_ids` (512 tokens each, the last one the remainder of `input_length`), or
    `tokens`, or `human`: the turns of one conversation. Each turn becomes a request that follows
    the turns before it, interleaved with other conversations. `ConfigError` names a line that has
    neither.
    """
    return _interleaved(json_lines(file, _Line, "the trace"), block_tokens, tokenize or four_bytes)


def _interleaved(
    lines: Iterator[tuple[int, _Line]], block_tokens: int, tokenize: Tokenize
) -> Iterator[Request]:
    chance = random.Random(0)
    waiting: list[tuple[float, int, int, list[int], list[str]]] = []
    for number, line in lines:
        while waiting and waiting[0][0] <= number:
            yield _turn(waiting, chance, block_tokens, tokenize)
        if line.human is not None:
            if line.human:
                heapq.heappush(waiting, (number, number, 0, [], line.human))
        else:
            yield _request(number, line, block_tokens)
    while waiting:
        yield _turn(waiting, chance, block_tokens, tokenize)


def _turn(
    waiting: list[Any], chance: random.Random, block_tokens: int, tokenize: Tokenize
) -> Request:
    """The next turn of the conversation whose turn it is."""
    when, number, turn, tokens, texts = heapq.heappop(waiting)
    tokens = [*tokens, *tokenize(texts[turn])]
    if turn + 1 < len(texts):
        later = when + chance.expovariate(1 / _BETWEEN_TURNS)
        heapq.heappush(waiting, (later, number, turn + 1, tokens, texts))
    return chunks(tokens, block_tokens)


def _request(number: int, line: _Line, block_tokens: int) -> Request:
    if line.hash_ids is not None:
        return _hashed(line.hash_ids, line.input_length)
    if line.tokens is not None:
        return chunks(line.tokens, block_tokens)
    raise ConfigError(
        f"line {number} of the trace has neither hash_ids nor tokens nor human; "
        "name a file of prompts with --prompts FILE"
    )


def _hashed(ids: Sequence[int | str], length: int | None) -> Request:
    if not ids:
        return ()
    before = HASHED_TOKENS * (len(ids) - 1)
    last = HASHED_TOKENS if length is None else max(1, min(HASHED_TOKENS, length - before))
    return (*(Chunk(str(name), HASHED_TOKENS) for name in ids[:-1]), Chunk(str(ids[-1]), last))


def chunks(tokens: Sequence[int] | Tokens, block_tokens: int, tenant: str = "") -> Request:
    """Runs of `block_tokens` tokens, the last one shorter, each named by its tenant and its whole
    prefix."""
    raw = np.asarray(tokens, np.int64).tobytes()
    hasher, found = blake3.blake3(_seed(tenant)), []
    for start in range(0, len(tokens), block_tokens):
        stop = min(start + block_tokens, len(tokens))
        hasher.update(raw[8 * start : 8 * stop])
        found.append(Chunk(hasher.hexdigest(length=16), stop - start))
    return tuple(found)


def _seed(tenant: str) -> bytes:
    return blake3.blake3(tenant.encode()).digest() if tenant else b""


def four_bytes(text: str) -> Sequence[int]:
    """A token for every four bytes: about as many as a tokenizer gives for English."""
    raw = text.encode("utf-8", "replace") + b"\n"
    padded = raw + bytes(-len(raw) % 4)
    tokens: list[int] = np.frombuffer(padded, np.uint32).tolist()
    return tokens


def tokenizer(path: Path) -> Tokenize:
    """The tokenizer in a `tokenizer.json`, or in a folder with one. It adds no tokens of its own:
    recorded text has those of its turns."""
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - optional: `kvshare-store[transformers]`
    except ImportError as error:
        raise UnsupportedError(
            "--tokenizer needs a library: pip install 'kvshare-store[transformers]'"
        ) from error
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path} is not a tokenizer.json: {error}") from error
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)
