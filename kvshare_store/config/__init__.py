"""Settings: `settings` has every one of them, `reading` where its value comes from; `files` reads
what people name, `secrets` the keys."""

from __future__ import annotations

from kvshare_store.config.files import json_lines, read_yaml
from kvshare_store.config.reading import (
    Settings,
    load_config,
    load_settings,
    named_file,
    parse_size,
    unknown_variables,
)
from kvshare_store.config.secrets import master_key, private_file
from kvshare_store.config.settings import (
    FIELDS,
    FIELDS_HELP,
    LONGEST_POOL,
    MOST_POOLS,
    PER_ENGINE,
    EvictionName,
    PolicyName,
    StoreConfig,
    default_home,
    policy_names,
)

__all__ = [
    "FIELDS",
    "FIELDS_HELP",
    "LONGEST_POOL",
    "MOST_POOLS",
    "PER_ENGINE",
    "EvictionName",
    "PolicyName",
    "Settings",
    "StoreConfig",
    "default_home",
    "json_lines",
    "load_config",
    "load_settings",
    "master_key",
    "named_file",
    "parse_size",
    "policy_names",
    "private_file",
    "read_yaml",
    "unknown_variables",
]
