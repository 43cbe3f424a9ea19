"""The tiers below host that a configuration asks for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvshare_store.blocks.io_loop import IoLoop
from kvshare_store.blocks.levels import Level
from kvshare_store.blocks.remotes import open_remote
from kvshare_store.blocks.remotes.owner import Owner
from kvshare_store.blocks.tiers.base import Beside
from kvshare_store.blocks.tiers.disk.tier import DiskTier
from kvshare_store.blocks.tiers.remote import RemoteTier
from kvshare_store.blocks.tiers.wrappers import resilient
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError, ForeignError, KVShareError
from kvshare_store.keys import Keyring

log = logging.getLogger("kvshare")

_START_S = 2.0
"""How long a start waits for the remote to say which store it belongs to."""


def open_levels(
    config: StoreConfig,
    io: IoLoop,
    keys: Keyring | None,
    beside: Callable[[], Beside],
    owner: Owner | None,
) -> list[Level]:
    """The levels, the fastest first. `beside`: files of the home that are not blocks.
    `ForeignError` if the remote's prefix belongs to another store than `owner`."""
    levels = []
    if config.disk:
        opened = DiskTier.open(config.home_path, config.disk_bytes, config.disk_codec, keys, beside)
        disk = io.run(opened)
        # other machines cannot read this disk: with a shared catalogue it is only a cache
        required = config.disk_write == "through" and not config.catalog
        levels.append(Level(disk, back=config.disk_write == "back", required=required))
    if config.remote:
        required = not any(level.required for level in levels)
        levels.append(_remote(config, io, keys, owner, required=required))
    return levels


def check_levels(config: StoreConfig) -> None:
    """`ConfigError` unless some tier below host holds every committed row and survives the
    process."""
    if config.catalog and not config.remote:
        raise ConfigError("a shared catalog needs a remote tier that all its machines reach")
    if config.catalog and config.remote_write == "back":
        raise ConfigError("a shared catalog needs remote_write: through")
    if config.disk and config.disk_write == "back" and config.remote_write == "back":
        raise ConfigError("disk_write: back needs a remote tier with remote_write: through")
    if config.remote and not config.disk and config.remote_write == "back":
        raise ConfigError("without a disk tier the remote tier needs remote_write: through")


def _remote(
    config: StoreConfig, io: IoLoop, keys: Keyring | None, owner: Owner | None, *, required: bool
) -> Level:
    timeout_s = config.remote_timeout_ms / 1e3
    tier = RemoteTier(
        open_remote(config.remote, timeout_s),
        budget=config.remote_bytes,
        codec=config.remote_codec,
        key=keys,
        owner=owner,
    )
    if owner is not None:
        _check_owner(owner, tier, io, timeout_s)
    if config.remote_bytes and tier.remote.properties.listing:
        io.submit(tier.discover())  # what is there already counts
    return Level(
        resilient(tier, config.remote_timeout_ms),
        back=config.remote_write == "back",
        required=required,
        shared=bool(config.catalog),
        remote=tier,
    )


def _check_owner(owner: Owner, tier: RemoteTier, io: IoLoop, timeout_s: float) -> None:
    """Refuse a prefix of another store at once. If the remote does not answer now, it is asked
    again before the first write."""
    try:
        io.run(asyncio.wait_for(owner.check(tier.remote), max(timeout_s, _START_S)))
    except ForeignError:
        io.run(tier.close())
        raise
    except (KVShareError, TimeoutError) as error:
        log.warning(
            "kvshare: the remote could not be asked yet which store it belongs to: %s", error
        )
