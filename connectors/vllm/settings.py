"""From vLLM's `kv_connector_extra_config` to a `StoreConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from kvshare_store.config import LONGEST_POOL, Settings, StoreConfig, load_settings
from kvshare_store.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "kvshare."
_IDLE_EXIT_S = 600.0
"""A daemon that an engine started exits ten minutes after its last engine, unless a setting says
otherwise."""

_FILLED_EXIT_S = 10.0
"""The same of one that fills a pool: who serves next starts a daemon with settings of its own."""

FILLS = f"{PREFIX}publish"
"""The pool that an engine fills. It is no setting: only `kvshare publish` starts such an engine,
neither environment nor file can, and the daemon lets `admin` alone store into pools."""
_FILLING = {
    "policy": "exact", "store_answers": False, "second_look": "off", "tenant_key": "", "pools": "",
}  # fmt: skip
"""Settings of an engine that fills a pool: only what it computes itself goes there."""


def pool_of(vllm_config: VllmConfig) -> str:
    """The pool that this engine fills; empty if it serves requests."""
    transfer = vllm_config.kv_transfer_config
    pool = str(transfer.kv_connector_extra_config.get(FILLS, "")) if transfer is not None else ""
    if len(pool) > LONGEST_POOL:
        raise ConfigError(f"a pool's name has at most {LONGEST_POOL} characters")
    return pool


def settings_of(vllm_config: VllmConfig) -> StoreConfig:
    """`kvshare.<field>` entries over environment, file and defaults; `ConfigError` if wrong."""
    config = sourced_settings(vllm_config).config
    return msgspec.structs.replace(config, **_FILLING) if pool_of(vllm_config) else config


def sourced_settings(vllm_config: VllmConfig) -> Settings:
    """What was given, with the source of each value: for the daemon, if this engine starts it."""
    transfer = vllm_config.kv_transfer_config
    extra = dict(transfer.kv_connector_extra_config) if transfer is not None else {}
    unknown = [name for name in extra if not name.startswith(PREFIX)]
    if unknown:
        raise ConfigError(f"kv_connector_extra_config: {unknown[0]!r} does not start with {PREFIX}")
    explicit = {name.removeprefix(PREFIX): value for name, value in extra.items() if name != FILLS}
    idle = _FILLED_EXIT_S if pool_of(vllm_config) else _IDLE_EXIT_S
    return load_settings(explicit, defaults={"idle_exit_s": idle})
