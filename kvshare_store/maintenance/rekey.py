"""Another master key for a home that nobody uses.

Blocks and nodes are sealed with keys of their namespaces, which stay. The master key seals the
records of namespaces, which lead to these keys, and what was learned of quality: that is all that
is written anew.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.commit.home import check_format, take_lock
from kvshare_store.config import StoreConfig, master_key
from kvshare_store.errors import ConfigError, StorageError
from kvshare_store.errors.wording import os_reason
from kvshare_store.keys import Keyring
from kvshare_store.quality import keeping


class Rekeyed(NamedTuple):
    """What was done."""

    sealed: int
    """Namespaces that have the new key now and had the old one."""
    namespaces: int
    """All of them."""


def rekey(config: StoreConfig, source: str, *, alone: bool = False) -> Rekeyed:
    """Put the key that `source` leads to in place of `encryption_key`.

    A crash leaves a home that the old key opens, or one that the new key opens; the same call again
    ends what was begun. `BusyError` while a store has the home, `ConfigError` if `encryption_key`
    is not the home's. `alone`: no other machine uses the catalogue, if it is a shared one.
    """
    if not config.encryption_key:
        raise ConfigError("no encryption_key is set: say which key the store has now")
    if not (config.disk or config.remote):
        raise ConfigError("this store keeps nothing: start it with another encryption_key")
    if config.catalog and not alone:
        raise ConfigError(
            "the catalogue is shared: stop the stores of all machines, then rekey on one of them "
            "with --alone"
        )
    home, lock = config.home_path, take_lock(config.home_path)
    try:
        check_format(home)
        old = Keyring(master_key(config.encryption_key))
        new = Keyring(master_key(source, "the new key"))
        catalog = Catalog(config.catalog or home / "catalog")
        done = Rekeyed(*catalog.records.rekey(old, new))
        learned = keeping.File(home / keeping.NAME, old.of_table(keeping.NAME))
        _reseal(learned, new.of_table(keeping.NAME))
    finally:
        os.close(lock)
    return done


def _reseal(learned: keeping.File, key: bytes) -> None:
    try:
        learned.reseal(key)
    except OSError as error:
        raise StorageError(
            "all namespaces have the new key, but what was learned of quality was not written: "
            f"{os_reason(error)}; run the same command again, or go on without it"
        ) from error
