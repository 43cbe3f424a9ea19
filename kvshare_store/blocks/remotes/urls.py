"""Parses the address of a remote. Secrets in it never get into a message."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from kvshare_store.errors import ConfigError, UnsupportedError


class RemoteURL(NamedTuple):
    """`scheme://user:password@host:port/path?options`."""

    scheme: str
    user: str | None
    password: str | None
    host: str
    port: int | None
    path: str
    options: dict[str, str]

    def refuse_credentials(self) -> None:
        """`ConfigError` if the URL carries a user or a password."""
        if self.user or self.password:
            raise ConfigError(
                f"remote: a {self.scheme} URL must not hold credentials; "
                "put them into the environment"
            )

    def check_options(self, *known: str) -> None:
        """`ConfigError` naming the first option that is not `known`."""
        for name in self.options:
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise ConfigError(f"remote: unknown option {name!r} for {self.scheme}: {allowed}")

    def flag(self, name: str) -> bool:
        """An option that is `true` or `false` (the default)."""
        value = self.options.get(name, "false").lower()
        if value not in ("true", "false"):
            raise ConfigError(f"remote: {name} must be true or false")
        return value == "true"


def parse_url(url: str) -> RemoteURL:
    """The parts of an address; `ConfigError` without the address, which may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)) if (
            parts.query
        ) else {}  # fmt: skip
    except ValueError:
        raise ConfigError("remote: the URL cannot be read; write e.g. s3://bucket/prefix") from None
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    # not parts.hostname, which is lower case: bucket names are not host names
    host = parts.netloc.rpartition("@")[2]
    if port is not None:
        host = host.rpartition(":")[0]
    return RemoteURL(parts.scheme, user, password, host, port, unquote(parts.path), options)


def missing_extra(extra: str) -> UnsupportedError:
    """The message for a missing library of a remote."""
    return UnsupportedError(f"this remote needs a library: pip install 'kvshare-store[{extra}]'")
