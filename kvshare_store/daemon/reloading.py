"""Which settings may change while a daemon runs, and what a change of them comes to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvshare_store.config import FIELDS, StoreConfig
from kvshare_store.errors import ConfigError

LIVE = (
    "min_saving_ms", "approximation_price", "unconfirmed_share", "candidates", "max_donors",
    "plan_deadline_ms", "lease_seconds", "max_nodes", "namespace_bytes", "namespace_nodes",
    "plans_per_second", "saves_per_second", "tenant_limits", "max_chain", "max_scatter",
    "idle_exit_s", "drain_seconds", "log_format", "log_prompts", "second_look_control",
    "quality_bound", "quality_confidence",
)  # fmt: skip
"""Settings that count from the moment at which they are read again. All others need a restart."""


_REST_S = 0.25
"""A file that has not changed for so long is taken for complete."""
_RESTS = 40


def files_of(config: StoreConfig, file: str) -> list[str]:
    """The files that are read again: that of the settings, and those that they name."""
    named = (file, config.tls_cert, config.tls_key, config.tls_clients, config.tls_roles,
             config.tenant_limits)  # fmt: skip
    return [path for path in named if path]


def wait_until_written(paths: Sequence[str]) -> None:
    """Return once no file changes any more: somebody may be in the middle of writing one. Half of
    it, or an empty one, may be sound, and would take limits away without a word. `ConfigError`
    where that does not end."""
    if not paths:
        return
    before = _looks(paths)
    for _ in range(_RESTS):
        time.sleep(_REST_S)
        now = _looks(paths)
        if now == before:
            return
        before = now
    raise ConfigError(f"{' or '.join(paths)} changes all the time: send SIGHUP once it does not")


def _looks(paths: Sequence[str]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for path in paths:
        try:
            status = Path(path).expanduser().stat()
        except (OSError, RuntimeError):  # whoever reads it says what is wrong
            found.append(())
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


class Change(NamedTuple):
    """The settings from now on."""

    config: StoreConfig
    told: str
    """What has changed and what has not, for the log. No value of a setting that needs a restart:
    some are secret."""


def changed(now: StoreConfig, asked: StoreConfig) -> Change:
    """The settings that are in effect after `asked` was read again."""
    other = [name for name in FIELDS if getattr(now, name) != getattr(asked, name)]
    live = {name: getattr(asked, name) for name in other if name in LIVE}
    new = [f"{name} is {value} now, was {getattr(now, name)}" for name, value in live.items()]
    late = ", ".join(name for name in other if name not in LIVE)
    told = "settings were read again: " + ("; ".join(new) or "no setting has changed")
    if asked.tenant_limits:
        told += "; the file of tenant_limits was read too"
    if late:
        told += f"; a restart is needed for {late}"
    return Change(msgspec.structs.replace(now, **live), told)


def nothing_named(*, more: bool) -> str:
    """What a daemon without a settings file says of a reload. `more`: other files are named, and
    these were read again."""
    read = "only keys, roles and limits of tenants were read again"
    what = read if more else "nothing to read again"
    return f"no settings file was named at start: {what}"
