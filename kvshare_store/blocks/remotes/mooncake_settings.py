"""How a Mooncake Store is reached and loaded."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from kvshare_store.blocks.remotes.urls import RemoteURL, missing_extra
from kvshare_store.config import parse_size
from kvshare_store.errors import ConfigError, UnsupportedError


class MooncakeSettings(NamedTuple):
    """The address of the master, and what this process contributes."""

    host: str
    port: int
    prefix: str
    """A prefix of every key, so that deployments can share one store."""
    local_host: str
    """The address at which the other machines reach this one; empty: that of the connection."""
    metadata: str
    segment_bytes: int
    """Bytes of memory that this process lends to the store. 0: all memory belongs to
    `mooncake_client` processes, and nothing is lost when this process ends."""
    buffer_bytes: int
    """Bytes of the transfer buffer; no value may be larger."""
    protocol: str
    device: str
    admin: str
    """`host:port` of the master's HTTP server, which is needed to list values."""


def read_settings(url: RemoteURL) -> MooncakeSettings:
    """`mooncake://master:port[/prefix][?local_host=&metadata=&segment=&buffer=&protocol=&device=
    &admin=]`."""
    url.refuse_credentials()
    url.check_options("local_host", "metadata", "segment", "buffer", "protocol", "device", "admin")
    if url.port is None:
        raise ConfigError("remote: mooncake:// needs the port of the master")
    prefix = url.path.strip("/")
    return MooncakeSettings(
        host=url.host,
        port=url.port,
        prefix=prefix and prefix + "/",
        local_host=url.options.get("local_host", ""),
        metadata=url.options.get("metadata", "P2PHANDSHAKE"),
        segment_bytes=parse_size(url.options.get("segment", "0B"), "segment"),
        buffer_bytes=parse_size(url.options.get("buffer", "128MiB"), "buffer"),
        protocol=url.options.get("protocol", "tcp"),
        device=url.options.get("device", ""),
        admin=url.options.get("admin", ""),
    )


def limit_waiting(timeout_s: float) -> None:
    """Set the library's timeouts, which it reads from the environment alone; values that an
    operator has set stay. Its defaults are half a minute and more, and a thread that waits cannot
    be stopped."""
    milliseconds, seconds = str(round(timeout_s * 1000)), str(max(1, round(timeout_s)))
    for name, value in (
        ("MC_RPC_TIMEOUT_MS", milliseconds),
        ("MC_RPC_CONNECT_TIMEOUT_MS", milliseconds),
        ("MC_TCP_STATUS_TIMEOUT_SEC", seconds),
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", seconds),
        ("MC_STORE_CLIENT_SETUP_RETRIES", "1"),
    ):
        os.environ.setdefault(name, value)


def load_library() -> Any:
    """The binding; `UnsupportedError` saying what to install."""
    try:
        import mooncake.store as library  # noqa: PLC0415 - starts threads, and needs system libraries
    except ModuleNotFoundError as error:
        raise missing_extra("mooncake") from error
    except ImportError as error:
        raise UnsupportedError(
            f"Mooncake does not load: {error}; Debian has libibverbs1 and librdmacm1"
        ) from error
    return library
