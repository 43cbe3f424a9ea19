"""Where secrets come from, such as the master key."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from kvshare_store.config import master_key
from kvshare_store.errors import ConfigError

KEY = bytes(range(100, 132))


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return f"file:{path}"


@pytest.mark.parametrize(
    "content",
    [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n", base64.b64encode(KEY)],
    ids=["raw", "hex", "HEX with a line end", "base64"],
)  # fmt: skip
def test_a_file(tmp_path: Path, content: bytes) -> None:
    assert master_key(key_file(tmp_path, content)) == KEY


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        master_key(key_file(tmp_path, KEY, 0o640))


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY.hex())
    assert master_key("env:SOME_KEY") == KEY
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="SOME_KEY is not set"):
        master_key("env:SOME_KEY")


def test_a_command() -> None:
    line = f"{sys.executable} -c \"print('{KEY.hex()}')\""
    assert master_key(f"command:{line}") == KEY


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{sys.executable} -c \"raise SystemExit('denied')\"", "exited with 1: denied"),
        ("/nowhere/kms decrypt", "cannot run"),
        (f"{sys.executable} -c \"print('short')\"", "no key of 32 bytes"),
    ],
)
def test_a_command_that_gives_no_key(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        master_key(f"command:{line}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("command:", "no command is named"),
        ("command:  ", "no command is named"),
        ("command:'/etc/key", "cannot be split into words"),
        ("command:/bin/echo\0", "cannot run"),
        ("command:''", "cannot run"),
        ("file:~nobody-of-this-name/key", "cannot be read"),
        ("file:/etc/a\0b", "cannot be read"),
        ("env:", "is not set"),
        ("env:a\0b", "is not set"),
    ],
)
def test_a_source_that_leads_nowhere(source: str, words: str) -> None:
    """`kvshare rekey` takes any text."""
    with pytest.raises(ConfigError, match=f"^the new key: .*{words}"):
        master_key(source, "the new key")


@pytest.mark.parametrize(
    "content", [b"", b"short", KEY + b"x", b"zz" * 32, KEY.hex().encode()[:-2]]
)
def test_what_is_no_key(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="holds no key of 32 bytes"):
        master_key(key_file(tmp_path, content))


def test_a_message_never_repeats_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-but-wrong")
    with pytest.raises(ConfigError) as error:
        master_key("env:SOME_KEY")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        master_key(f"file:{tmp_path / 'absent'}")
