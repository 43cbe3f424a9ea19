"""From LMCache's `adapter_params` to a `StoreConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvshare_connectors.lmcache.interface import lmcache_interface

from kvshare_store.config import StoreConfig, load_config, parse_size

_ConfigBase: Any = lmcache_interface().config
_IDLE_EXIT_S = 600.0
"""A daemon that LMCache started goes ten minutes after its last client, unless told otherwise."""


class KVShareL2AdapterConfig(_ConfigBase):  # type: ignore[misc,no-any-unimported]
    """What `adapter_params` say."""

    def __init__(self, store: StoreConfig, capacity_bytes: int = 0) -> None:
        self.store = store
        self.capacity_bytes = capacity_bytes

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> KVShareL2AdapterConfig:
        """Settings of the store, and `capacity_bytes`; `ConfigError` (a `ValueError`) if wrong."""
        settings = dict(d)
        capacity = parse_size(settings.pop("capacity_bytes", 0), "capacity_bytes")
        store = load_config(settings, defaults={"idle_exit_s": _IDLE_EXIT_S})
        return cls(store, capacity)

    @classmethod
    def help(cls) -> str:
        """For LMCache's command line."""
        return (
            "KVShare L2 adapter, adapter_params:\n"
            "- home (str): folder of the store\n"
            "- any other setting of the store, e.g. disk_bytes, encryption_key\n"
            "- capacity_bytes (int or str): what LMCache's own eviction takes as full "
            "(default 0: the store evicts by itself)"
        )
