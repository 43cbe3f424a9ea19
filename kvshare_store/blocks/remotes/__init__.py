"""Storage engines of other projects that keep blocks for several machines. `base.Remote` is what
KVShare needs of them."""

from __future__ import annotations

from kvshare_store.blocks.remotes.base import Remote
from kvshare_store.blocks.remotes.urls import parse_url
from kvshare_store.errors import ConfigError


def open_remote(url: str, timeout_s: float = 10.0) -> Remote:
    """The remote at an address. Nothing is sent before the first call on it.

    `timeout_s`: how long the engine's own client waits for an answer; callers with less time
    cancel. `ConfigError` for an address that is not valid, `UnsupportedError` if the engine's
    library is not installed.
    """
    parts = parse_url(url)
    if timeout_s <= 0:
        raise ConfigError("remote: the timeout must be greater than zero")
    if parts.scheme != "file" and not parts.host and parts.scheme in _SCHEMES:
        raise ConfigError(f"remote: {parts.scheme}:// needs a host or a bucket")
    # each engine's library is loaded only where that engine is used
    if parts.scheme == "s3":
        from kvshare_store.blocks.remotes.objects import open_s3  # noqa: PLC0415

        return open_s3(parts, timeout_s)
    if parts.scheme == "file":
        from kvshare_store.blocks.remotes.objects import open_folder  # noqa: PLC0415

        return open_folder(parts)
    if parts.scheme in ("redis", "rediss"):
        from kvshare_store.blocks.remotes.redis import open_redis  # noqa: PLC0415

        return open_redis(parts, timeout_s)
    if parts.scheme == "mooncake":
        from kvshare_store.blocks.remotes.mooncake import open_mooncake  # noqa: PLC0415

        return open_mooncake(parts, timeout_s)
    raise ConfigError(f"remote: {parts.scheme!r} is not one of {', '.join(_SCHEMES)}")


_SCHEMES = ("s3", "file", "redis", "rediss", "mooncake")
