"""What each tenant may have and ask for: the limits of the settings, or its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_store.config import StoreConfig, load_config, read_yaml
from kvshare_store.errors import ConfigError
from kvshare_store.errors.wording import unknown
from kvshare_store.namespace import Namespace


class Limits(NamedTuple):
    """Of each namespace of one tenant, by the names of the settings. 0: no limit."""

    namespace_bytes: int = 0
    namespace_nodes: int = 0
    plans_per_second: float = 0.0
    saves_per_second: float = 0.0


_POOL = Limits()
"""Limits bound tenants: what the operator publishes has none."""


class TenantLimits:
    """The limits of every namespace."""

    def __init__(self, config: StoreConfig) -> None:
        """`ConfigError` if the file of `tenant_limits` cannot be used."""
        self.others = Limits(*(getattr(config, name) for name in Limits._fields))
        """Of tenants that have none of their own."""
        path = config.tenant_limits
        self._own = _read(Path(path), self.others) if path else {}

    @property
    def quotas(self) -> bool:
        """Whether any namespace may be too large."""
        every = (self.others, *self._own.values())
        return any(one.namespace_bytes or one.namespace_nodes for one in every)

    def of(self, namespace: Namespace | None) -> Limits:
        """The limits of a namespace; None: of one that nobody knows any more."""
        if namespace is None:
            return self.others
        return _POOL if namespace.pool else self._own.get(namespace.tenant, self.others)


def _read(path: Path, others: Limits) -> dict[str, Limits]:
    """Limits by tenant; what a tenant's entry does not say is that of the others. No message names
    a tenant: its name may be the salt that gives access."""
    wrong = "must hold 'tenant: {limit: value}' lines"
    entries = read_yaml(path, "tenant_limits", wrong, dict[str, dict[str, Any]] | None, _told)
    return {
        tenant: _limits(given, others, f"tenant_limits {path}, entry {at}: ")
        for at, (tenant, given) in enumerate((entries or {}).items(), 1)
    }


def _told(error: Exception) -> str:
    """What is wrong, without the name of a tag: `!name` is how a tenant may be called too."""
    return re.sub(r"the tag '[^\n]*'", "a tag", str(error))


def _limits(given: Mapping[str, Any], others: Limits, where: str) -> Limits:
    for name in given:
        if name not in Limits._fields:
            raise ConfigError(where + unknown("limit", name, Limits._fields))
    try:
        config = load_config(given, environ={})
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    return others._replace(**{name: getattr(config, name) for name in given})
