"""Files that people name: YAML, and JSON line by line."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import os_reason

Line = TypeVar("Line")


def read_yaml(
    path: Path, name: str, wrong: str, kind: Any = Any, told: Callable[[Exception], str] = str
) -> Any:
    """What a YAML file holds, as a value of type `kind`; `ConfigError` if it cannot be had.

    The message has the `name` of the setting; of a file that holds something else it says what is
    `wrong`, and what `told` makes of the reason.
    """
    try:
        text = path.expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # nobody's home folder; a NUL
        raise ConfigError(f"{name} {path} cannot be read: {os_reason(error)}") from error
    try:
        return msgspec.yaml.decode(text, type=kind)
    except Exception as error:  # PyYAML raises whatever fails while it makes a value
        raise ConfigError(f"{name} {path} {wrong}: {told(error)}") from error


def json_lines(file: IO[bytes], kind: type[Line], what: str) -> Iterator[tuple[int, Line]]:
    """The lines of a JSONL file (gzip or not) with their numbers; empty ones are skipped.

    `ConfigError` names the line that is not of this kind; `what`: how it calls the file.
    """
    decode = msgspec.json.Decoder(kind).decode
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    number = 0
    try:
        with gzip.open(file) if packed else nullcontext(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{what} cannot be read: line {number}: {error}") from error
    except (OSError, EOFError) as error:
        raise ConfigError(f"{what} cannot be read after line {number}: {error}") from error
