"""From vLLM's `kv_connector_extra_config` to a `StoreConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvshare_store.config import Settings, StoreConfig, load_settings
from kvshare_store.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "kvshare."
_IDLE_EXIT_S = 600.0
"""A daemon that an engine started exits ten minutes after its last engine, unless a setting says
otherwise."""


def settings_of(vllm_config: VllmConfig) -> StoreConfig:
    """`kvshare.<field>` entries over environment, file and defaults; `ConfigError` if wrong."""
    return sourced_settings(vllm_config).config


def sourced_settings(vllm_config: VllmConfig) -> Settings:
    """As `settings_of`, with the source of each value."""
    transfer = vllm_config.kv_transfer_config
    extra = dict(transfer.kv_connector_extra_config) if transfer is not None else {}
    unknown = [name for name in extra if not name.startswith(PREFIX)]
    if unknown:
        raise ConfigError(f"kv_connector_extra_config: {unknown[0]!r} does not start with {PREFIX}")
    explicit = {name.removeprefix(PREFIX): value for name, value in extra.items()}
    return load_settings(explicit, defaults={"idle_exit_s": _IDLE_EXIT_S})
