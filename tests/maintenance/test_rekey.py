"""Another master key: all is served as before, by the new key only, wherever it is cut off."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lancedb
import pytest

from kvshare_store.blocks.tiers.disk import files
from kvshare_store.catalog.table import Table
from kvshare_store.config import StoreConfig, master_key
from kvshare_store.errors import BusyError, ConfigError, CorruptBlockError, StorageError
from kvshare_store.keys import SALT_BYTES, Keyring, unseal
from kvshare_store.maintenance.check import check_blocks, check_tree
from kvshare_store.maintenance.rekey import Rekeyed, rekey
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from tests.quality.streams import score
from tests.support.crashes import Copy, Crashes
from tests.support.oracle import Driver, RowBook, prompt

Config = Callable[..., StoreConfig]
FIRST, SECOND = prompt(1, 60), prompt(2, 40)
EDITED = [*FIRST[:20], *prompt(3, 4), *FIRST[24:]]


@pytest.fixture
def key(tmp_path: Path) -> Callable[[str], str]:
    """`key(name)`: the setting for a key of that name."""

    def make(name: str) -> str:
        path = tmp_path / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(os.urandom(32).hex())
        return f"file:{path}"

    return make


class Told:
    """A home with prompts of two tenants, an edited one among them, and a class that is known."""

    def __init__(self, settings: StoreConfig, namespace: Namespace) -> None:
        self.spaces = [namespace.for_tenant(name) for name in ("ann", "bob")]
        self.books = [RowBook(namespace.layout) for _ in self.spaces]
        with Store(settings) as store:
            for space, book in zip(self.spaces, self.books, strict=True):
                engine = Driver(store, space, book)
                engine.save(FIRST)
                engine.serve_and_save(EDITED)
            store.quality.observe(score("faithful", namespace=self.spaces[0].digest))

    def check(self, settings: StoreConfig, *, learned: bool = True) -> None:
        """All of it is there under these settings, and sound."""
        with Store(settings) as store:
            for space, book in zip(self.spaces, self.books, strict=True):
                engine = Driver(store, space, book)
                assert engine.serve(FIRST).exact == len(FIRST) - 1
                assert engine.serve(EDITED).reused == len(EDITED) - 1
            assert len(store.quality.report()) == learned
            assert store.stats()["errors"] == ({} if learned else {"corrupt": 1})
            tree = check_tree(store.repository, repair=False)
            assert tree.problems == ()
            assert check_blocks(store.repository, tree.blocks, repair=False).problems == ()


@pytest.fixture
def told(config: Config, namespace: Namespace, key: Callable[[str], str]) -> Told:
    return Told(config(encryption_key=key("old")), namespace)


def salts(home: Path) -> list[bytes]:
    """What the records of namespaces have as their salts."""
    return [bytes(row["salt"]) for row in records(home)]


def records(home: Path) -> list[dict[str, Any]]:
    """The rows of namespaces, read past the store."""
    table = lancedb.connect(str(home / "catalog")).open_table("namespaces")
    rows: list[dict[str, Any]] = table.to_arrow().to_pylist()
    return rows


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {
        str(at.relative_to(folder)): at.read_bytes() for at in folder.rglob("*") if at.is_file()
    }


def test_the_new_key_opens_all_of_it_and_the_old_one_nothing(
    told: Told, config: Config, home: Path, key: Callable[[str], str], namespace: Namespace
) -> None:
    before, blocks = salts(home), bytes_in(home / "blocks")
    assert rekey(config(encryption_key=key("old")), key("new")) == Rekeyed(2, 2)
    assert bytes_in(home / "blocks") == blocks, "no block is written anew"
    with pytest.raises(ConfigError, match="not the key of this store"):
        Store(config(encryption_key=key("old")))
    told.check(config(encryption_key=key("new")))
    catalog = b"".join(bytes_in(home / "catalog").values())
    assert not [salt for salt in before if salt in catalog], "the old key leads nowhere"
    opener = Keyring(master_key(key("new"))).of_table("namespaces")
    for row in records(home):  # a release that knows only salts is told that its key is wrong
        with pytest.raises(CorruptBlockError):
            unseal(opener, row["namespace"], row["digest"].encode())
    with Store(config(encryption_key=key("new"))) as store:  # a namespace of the new key alone
        Driver(store, namespace.for_tenant("eve")).save(SECOND)
    assert rekey(config(encryption_key=key("new")), key("third")) == Rekeyed(3, 3)
    told.check(config(encryption_key=key("third")))


def test_a_purge_destroys_a_key_that_was_kept(
    told: Told, config: Config, home: Path, key: Callable[[str], str]
) -> None:
    rekey(config(encryption_key=key("old")), key("new"))
    kept = salts(home)
    with Store(config(encryption_key=key("new"))) as store:
        assert store.purge(told.spaces[0].digest)[0].remaining == ()
    left = b"".join(bytes_in(home).values())
    assert sum(salt in left for salt in kept) == 1, "the other tenant's"


def test_wherever_it_is_cut_off_one_key_opens_all_of_it_and_it_can_be_ended(
    told: Told, config: Config, home: Path, key: Callable[[str], str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The home is copied before and after each write."""
    found = Crashes(home, tmp_path / "copies")
    for of, name in (
        (Table, "merge"), (Table, "rewrite"), (Table, "drop_versions"),
        (files, "write"), (files, "rename"),
    ):  # fmt: skip
        monkeypatch.setattr(of, name, found.around(getattr(of, name), name))
    before = salts(home)
    rekey(config(encryption_key=key("old")), key("new"))
    copies = distinct(found.end())
    monkeypatch.undo()
    opened = [check_copy(copy, told, config, key, before) for copy in copies]
    assert opened == sorted(opened, reverse=True), "it is the old key's, then the new one's"
    assert set(opened) == {"old", "new"}
    assert {
        "before merge",
        "after merge",
        "before drop_versions",
        "after drop_versions",
        "after write",
    } <= {c.step for c in copies}


def distinct(copies: list[Copy]) -> list[Copy]:
    """Those that differ from the one before."""
    found: list[Copy] = []
    for copy in copies:
        if not found or bytes_in(copy.home) != bytes_in(found[-1].home):
            found.append(copy)
    return found


def check_copy(
    copy: Copy, told: Told, config: Config, key: Callable[[str], str], before: list[bytes]
) -> str:
    """Which key opens the copy. The same call again ends what was begun there."""
    old, new = (config(home=str(copy.home), encryption_key=key(name)) for name in ("old", "new"))
    try:
        with Store(old):
            name = "old"
    except ConfigError:
        name = "new"
    done = rekey(old, key("new"))
    assert done == Rekeyed(2 if name == "old" else 0, 2), copy.step
    told.check(new)
    catalog = b"".join(bytes_in(copy.home / "catalog").values())
    assert not [salt for salt in before if salt in catalog], copy.step
    return name


def test_what_was_learned_begins_anew_where_it_was_cut_off_and_not_ended(
    told: Told, config: Config, key: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(*_: Any) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", torn)
        with pytest.raises(StorageError, match="gone"):
            rekey(config(encryption_key=key("old")), key("new"))
    told.check(config(encryption_key=key("new")), learned=False)


def test_what_cannot_be_done_changes_nothing(
    told: Told, config: Config, home: Path, key: Callable[[str], str]
) -> None:
    before = bytes_in(home)
    old = config(encryption_key=key("old"))
    for settings, source, why in (
        (config(encryption_key=key("other")), key("new"), "not the key of this store"),
        (config(), key("new"), "no encryption_key is set"),
        (config(encryption_key=key("old"), disk=False), key("new"), "keeps nothing"),
        (old, "file:/nowhere", "the new key: /nowhere cannot be read"),
        (config(encryption_key=key("old"), catalog=str(home / "catalog")), key("new"), "--alone"),
    ):
        with pytest.raises(ConfigError, match=why):
            rekey(settings, source)
    with Store(old), pytest.raises(BusyError):
        rekey(old, key("new"))
    told.check(old)
    assert {name: before[name] for name in before if name.startswith("blocks/")} == {
        name: text for name, text in bytes_in(home).items() if name.startswith("blocks/")
    }
    assert all(len(salt) == SALT_BYTES for salt in salts(home))


def test_a_store_in_clear_has_no_key_to_change(
    config: Config, namespace: Namespace, key: Callable[[str], str]
) -> None:
    Told(config(), namespace)
    with pytest.raises(ConfigError, match="not the key of this store"):
        rekey(config(encryption_key=key("old")), key("new"))


def test_a_key_that_is_kept_is_sealed_for_its_namespace(key: Callable[[str], str]) -> None:
    old, new = Keyring(master_key(key("old"))), Keyring(master_key(key("new")))
    old.learn("ab", bytes(32))
    kept = new.wrapped("ab", old("ab"))
    assert old("ab") not in kept
    new.learn("ab", kept)
    assert new("ab") == old("ab")
    for keys, namespace in ((old, "ab"), (new, "cd")):
        with pytest.raises(CorruptBlockError):
            keys.learn(namespace, kept)


def test_a_disk_that_is_full_leaves_what_can_be_ended(
    told: Told, config: Config, key: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says which key the home has."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as during:
        during.setattr(files, "write", full)
        with pytest.raises(StorageError, match=r"have the new key.*No space left.*again"):
            rekey(config(encryption_key=key("old")), key("new"))
    assert rekey(config(encryption_key=key("old")), key("new")) == Rekeyed(0, 2)
    told.check(config(encryption_key=key("new")))
