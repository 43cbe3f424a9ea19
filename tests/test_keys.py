"""Where the master key comes from, and what opens what it sealed."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from kvshare_store.errors import ConfigError, CorruptBlockError, NamespaceError
from kvshare_store.keys import SEAL_BYTES, Keyring, master_key, new_salt, seal, unseal

KEY = bytes(range(100, 132))
OTHER = bytes(32)
TEXT, ABOUT = b"rows of one tenant", b"name and namespace"


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return f"file:{path}"


# --- sources ------------------------------------------------------------------------------------


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


# --- seals --------------------------------------------------------------------------------------


def test_what_is_sealed_opens_with_the_same_key_and_associated_data() -> None:
    sealed = seal(KEY, TEXT, ABOUT)
    assert len(sealed) == len(TEXT) + SEAL_BYTES
    assert TEXT not in sealed
    assert bytes(unseal(KEY, sealed, ABOUT)) == TEXT
    assert seal(KEY, TEXT, ABOUT) != sealed, "a nonce is never used twice"


@pytest.mark.parametrize(("key", "about"), [(OTHER, ABOUT), (KEY, b"another name")])
def test_another_key_or_other_associated_data_open_nothing(key: bytes, about: bytes) -> None:
    with pytest.raises(CorruptBlockError):
        unseal(key, seal(KEY, TEXT, ABOUT), about)


def test_any_flipped_bit_and_any_cut_is_noticed() -> None:
    sealed = bytes(seal(KEY, TEXT, ABOUT))
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptBlockError):
            unseal(KEY, damaged, ABOUT)
    for length in range(len(sealed)):
        with pytest.raises(CorruptBlockError):
            unseal(KEY, sealed[:length], ABOUT)


# --- keys of namespaces -------------------------------------------------------------------------


def test_each_namespace_has_a_key_of_its_own_until_its_salt_is_forgotten() -> None:
    ring, salt = Keyring(KEY), new_salt()
    ring.learn("one", salt)
    ring.learn("two", salt)
    first = ring("one")
    assert "one" in ring
    assert len({bytes(first), bytes(ring("two")), ring.of_table("namespaces"), KEY}) == 4
    ring.forget("one")
    with pytest.raises(NamespaceError, match="has no key"):
        ring("one")
    ring.learn("one", new_salt())
    assert ring("one") != first, "another salt is another key"


def test_the_same_master_key_and_salt_give_the_same_key_everywhere() -> None:
    salt, keys = new_salt(), set()
    for master in (KEY, KEY, OTHER):
        ring = Keyring(master)
        ring.learn("one", salt)
        keys.add(ring("one"))
    assert len(keys) == 2
