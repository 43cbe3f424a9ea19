"""Secrets that settings lead to: in a file, in the environment, or printed by a command."""

from __future__ import annotations

import base64
import binascii
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import os_reason

KEY_BYTES = 32
_COMMAND_S = 30.0


def master_key(source: str, setting: str = "encryption_key") -> bytes:
    """The 32 bytes that `source`, the value of `setting`, leads to.

    `ConfigError`, which names the setting, if there are none.
    """
    kind, _, where = source.partition(":")
    try:
        if kind == "file":
            return _parsed(private_file(Path(where)), f"file {where}", raw=True)
        if kind == "env":
            value = os.environ.get(where)
            if value is None:
                raise ConfigError(f"environment variable {where} is not set")
            return _parsed(value.encode(), f"environment variable {where}", raw=False)
        if kind == "command":
            argv = _argv(where)
            return _parsed(_from_command(argv), f"command {argv[0]}", raw=True)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    raise ConfigError(f"{setting} must be file:PATH, env:NAME or command:ARGV")


def private_file(path: Path) -> bytes:
    """What a short file holds; `ConfigError` if it cannot be read, or if others may read it. A `~`
    is somebody's home folder."""
    try:
        descriptor = os.open(path.expanduser(), os.O_RDONLY)
        with open(descriptor, "rb") as file:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{path} has mode {mode:04o}, others may read it; chmod 600 {path}"
                )
            return file.read(1024)
    except ConfigError:  # which is a ValueError too
        raise
    except (OSError, RuntimeError, ValueError) as error:  # nobody's home folder; a NUL
        raise ConfigError(f"{path} cannot be read: {os_reason(error)}") from error


def _argv(line: str) -> list[str]:
    """The words of a command, one at least."""
    try:
        argv = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"the command cannot be split into words: {error}") from error
    if not argv:
        raise ConfigError("no command is named after command:")
    return argv


def _from_command(argv: list[str]) -> bytes:
    """What a command prints; it is started without a shell."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_COMMAND_S, check=False)
    except (OSError, ValueError) as error:  # a NUL
        raise ConfigError(f"{argv[0]} cannot run: {os_reason(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{argv[0]} printed no key in {_COMMAND_S:.0f} s") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").split("\n")[0][:200]
        raise ConfigError(f"{argv[0]} exited with {done.returncode}: {words}")
    return done.stdout


def _parsed(text: bytes, source: str, *, raw: bool) -> bytes:
    """32 bytes given raw (if `raw`), as 64 hex digits, or as base64."""
    words = text.strip()
    if raw and len(text) == KEY_BYTES and not re.fullmatch(rb"[0-9a-fA-F]+", text):
        return text
    try:
        key = (
            bytes.fromhex(words.decode("ascii"))
            if re.fullmatch(rb"[0-9a-fA-F]{64}", words)
            else base64.b64decode(words, validate=True)
        )
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        kinds = "32 bytes, 64 hex digits or base64" if raw else "64 hex digits or base64"
        raise ConfigError(f"{source} holds no key of 32 bytes ({kinds})")
    return key
