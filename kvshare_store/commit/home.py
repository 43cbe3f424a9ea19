"""The home: one owner at a time, everything under it readable by that user only."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

from kvshare_store.blocks.eviction import make_policy
from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.levels import Level
from kvshare_store.blocks.remotes.owner import Owner
from kvshare_store.blocks.tiers.base import Beside
from kvshare_store.blocks.tiers.disk import files
from kvshare_store.blocks.tiers.host.arena import Arena
from kvshare_store.blocks.tiers.host.tier import HostTier
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.commit.tiers import check_levels, open_levels
from kvshare_store.config import StoreConfig, master_key
from kvshare_store.errors import BusyError, ConfigError, HomeError
from kvshare_store.keys import Keyring
from kvshare_store.observability.threads import Health

log = logging.getLogger("kvshare")

FORMAT = "2"
"""The format that a home is marked with. A later release that adds something and changes nothing
that this one reads marks its homes `2.1`, `2.2` and so on."""
ENCRYPTED = "encrypted"
"""The file that marks a home whose store has a key. Before its first prompt nothing else tells."""
_BEFORE_FORMAT = {"format.new", "lock", "daemon.log", "config.yaml", "kvshare.sock"}
"""Files that may be in a home before its first owner has marked it."""


class Home:
    """An opened home: its lock, tiers and catalogue."""

    def __init__(
        self,
        lock: int,
        io: IoLoop,
        host: HostTier,
        below: list[Level],
        catalog: Catalog | None,
        keys: Keyring | None = None,
    ) -> None:
        self._lock = lock
        self.io = io
        self.host = host
        self.below = below
        """Tiers below host, the fastest first."""
        self.catalog = catalog
        self.keys = keys

    @classmethod
    def open(cls, config: StoreConfig, health: Health | None = None) -> Home:
        """Take the home over; `BusyError` if another process has it, `HomeError` if unusable."""
        home = config.home_path
        lock = take_lock(home)
        io = IoLoop(health)
        arena: Arena | None = None
        try:
            check_format(home)
            _check_mark(home, has_key=bool(config.encryption_key))
            keys = Keyring(master_key(config.encryption_key)) if config.encryption_key else None
            arena = Arena.create(config.host_bytes, huge=config.huge_pages == "auto")
            check_levels(config)
            catalog = None
            if config.disk or config.remote:
                catalog = Catalog(config.catalog or home / "catalog", keys)
            owner = None
            if config.remote and catalog is not None:
                owner = Owner(catalog.store_id(), catalog.records.digests())
            host = HostTier(arena, make_policy(config.eviction))
            below = open_levels(config, io, keys, beside(catalog), owner)
        except BaseException:  # whoever tries again must find the home unlocked
            if arena is not None:
                arena.close()
            io.close()
            os.close(lock)
            raise
        return cls(lock, io, host, below, catalog, keys)

    def close(self) -> None:
        """Let go of the home."""
        self.io.close()
        os.close(self._lock)


def beside(catalog: Catalog | None) -> Callable[[], Beside]:
    """What lies beside the blocks on the home's disk: its catalogue. One that several machines
    share is not in the home, and not in its budget."""
    if catalog is None or catalog.place.shared:
        return Beside
    return lambda: Beside(catalog.bytes, catalog.data_bytes)


def _foreign(home: Path) -> bool:
    """Whether a folder without the format mark holds files that are not a store's."""
    names = {entry.name for entry in home.iterdir()}
    return "format" not in names and bool(names - _BEFORE_FORMAT)


def take_lock(home: Path) -> int:
    """Take the lock that makes this process the owner of a home; returns its descriptor."""
    try:
        if home.is_dir() and _foreign(home):
            raise HomeError(
                f"home {home} holds other files and no store; choose an empty or a new folder"
            )
        if not home.exists():
            files.make_durable_folder(str(home))
        descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except HomeError:  # which is an OSError too
        raise
    except OSError as error:
        raise HomeError(
            f"home {home} cannot be used: {error.strerror}; choose another with --home or "
            "KVSHARE_HOME"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise BusyError(
            f"home {home} belongs to a running store; stop it, or choose another home. An engine "
            "starts its daemon again unless it has start_daemon: false"
        ) from error
    return descriptor


def check_format(home: Path) -> None:
    """Mark a new home with the format; refuse one whose format this release does not read."""
    mark = home / "format"
    try:
        found = mark.read_bytes().strip(b" \n\0").decode(errors="replace") if mark.exists() else ""
        if not found:  # a new home, or one whose first owner was stopped at this very moment
            _write_format(home)
            found = FORMAT
    except OSError as error:
        raise HomeError(f"home {home} cannot be used: {error.strerror}") from error
    if found.partition(".")[0] != FORMAT:
        raise HomeError(f"home {home} has format {found!r}, this release reads {FORMAT!r}")


def _write_format(home: Path) -> None:
    """Make the mark durable before anything is stored: without it a home counts as foreign."""
    unfinished = str(home / "format.new")
    files.discard(unfinished)
    files.write(unfinished, [FORMAT.encode()])
    files.rename(unfinished, str(home / "format"))
    files.sync_folder(str(home))


def _check_mark(home: Path, *, has_key: bool) -> None:
    """`ConfigError` where rows would be written in clear into a home that is marked."""
    if (home / ENCRYPTED).exists() and not has_key:
        raise ConfigError(
            "this store was made with an encryption_key, and that cannot be changed: set it, or "
            "choose another home"
        )


def mark_encrypted(home: Path) -> None:
    """Mark a home whose store has been opened with its key. One that cannot be marked now, since
    its disk is full, is marked at the next start."""
    if (home / ENCRYPTED).exists():
        return
    try:
        files.write(str(home / ENCRYPTED), [])
        files.sync_folder(str(home))
    except OSError as error:
        log.warning("kvshare: the home was not marked as encrypted: %s", error.strerror)
