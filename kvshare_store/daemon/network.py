"""A daemon on another machine: how it is named, listened for and reached."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from pathlib import Path
from typing import NamedTuple

from kvshare_store.config import StoreConfig
from kvshare_store.daemon.protocol import Role
from kvshare_store.daemon.tls import Roles, TlsStream, client_context, server_context
from kvshare_store.errors import ConfigError, HomeError, UnavailableError

_ADDRESS = re.compile(
    r"tcp://(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:/\s]+)):(?P<port>\d{1,5})"
)
_BACKLOG = 128
_SILENT_MS = 20_000
"""What was sent and is not acknowledged for so long ends a connection; so does a peer that does not
answer probes."""
_PROBES = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class Address(NamedTuple):
    """Of a daemon that listens to other machines."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, field: str) -> Address:
        """`tcp://HOST:PORT`, `tcp://[IPV6]:PORT`; `ConfigError` for anything else."""
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > 65_535:
            raise ConfigError(f"{field} must be tcp://HOST:PORT, got {text!r}")
        return cls(match["six"] or match["host"], int(match["port"]))

    def resolved(self, *, passive: bool = False) -> tuple[socket.AddressFamily, tuple[object, ...]]:
        """What a socket takes; asks the resolver, which may take its time. `UnavailableError` if
        nobody knows the host."""
        flags = socket.AI_PASSIVE if passive else 0
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        except OSError as error:
            raise UnavailableError(f"host {self.host} is not known: {error.strerror}") from error
        family, _, _, _, where = found[0]
        return family, where

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def _prepared(family: socket.AddressFamily) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _patient(stream: socket.socket) -> None:
    """Notice a machine that has gone without a word."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MS)
    for option, value in _PROBES:
        stream.setsockopt(socket.IPPROTO_TCP, option, value)


class NetworkListener:
    """A daemon's listening socket for other machines. `ConfigError` without keys, `HomeError` where
    nothing can be listened to."""

    def __init__(self, config: StoreConfig) -> None:
        self.address = Address.parse(config.listen, "listen")
        _need_keys(config, "listen", ("tls_cert", "tls_key", "tls_clients"))
        self.reload(config)
        family, where = self.address.resolved(passive=True)
        self.socket = _prepared(family)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(where)
            self.socket.listen(_BACKLOG)
        except OSError as error:
            self.socket.close()
            raise HomeError(f"{self.address} cannot be listened to: {error.strerror}") from error

    def reload(self, config: StoreConfig) -> None:
        """Read keys and roles again: they count for connections from now on. `ConfigError`, and
        nothing changes, if they cannot be used."""
        context, roles = server_context(config), Roles(config.tls_roles)
        self._context, self._roles = context, roles

    @property
    def port(self) -> int:
        """Where it listens, also if the system chose."""
        return int(self.socket.getsockname()[1])

    def accept(self) -> TlsStream | None:
        """The next connection; its handshake is made as it is used. None if it has gone already.
        `BlockingIOError` if nobody is there."""
        stream, (host, port, *_) = self.socket.accept()
        try:
            stream.setblocking(False)
            _patient(stream)
        except OSError:  # whoever hangs up at once must close the door to nobody else
            stream.close()
            return None
        peer = str(Address(host, port)).removeprefix("tcp://")
        return TlsStream(stream, self._context, server=True, peer=peer)

    def role_of(self, stream: TlsStream) -> Role:
        """What a client that has shown its certificate may ask for; `DeniedError` if nothing."""
        return self._roles.of(stream.certificate())

    def close(self) -> None:
        """Stop listening."""
        self.socket.close()


class _Resolving(threading.Thread):
    """Asks where a host is. Nobody can interrupt a resolver, so whoever waits for it can leave."""

    def __init__(self, address: Address) -> None:
        super().__init__(name="kvshare-resolve", daemon=True)
        self._address = address
        self.found: tuple[socket.AddressFamily, tuple[object, ...]] | None = None
        self.error: UnavailableError | None = None
        self.start()

    def run(self) -> None:
        """Ask."""
        try:
            self.found = self._address.resolved()
        except UnavailableError as error:
            self.error = error


class Remote:
    """A daemon of another machine, as its clients see it."""

    def __init__(self, config: StoreConfig) -> None:
        self.address = Address.parse(config.connect, "connect")
        _need_keys(config, "connect", ("tls_cert", "tls_key", "tls_server"))
        self._context = client_context(config)
        self._resolved: tuple[socket.AddressFamily, tuple[object, ...]] | None = None
        self._resolving: _Resolving | None = None

    def resolve(self, seconds: float | None = None) -> None:
        """Ask where the host is, unless that is known, and wait at most so long (None: as long as
        it takes). `UnavailableError` if nobody knows, or if nobody has said it by then."""
        if self._resolved is not None:
            return
        asked = self._resolving = self._resolving or _Resolving(self.address)
        asked.join(seconds)
        if asked.is_alive():
            raise UnavailableError(f"where {self.address.host} is was not said in {seconds:.1f} s")
        self._resolving = None
        if asked.error is not None:
            raise asked.error
        self._resolved = asked.found

    def doubt(self) -> None:
        """The daemon does not answer: it may be elsewhere by now."""
        self._resolved = None

    def connect(self) -> TlsStream:
        """A connection that is being made; nothing is waited for. `UnavailableError` unless
        `resolve` has found the host."""
        if self._resolved is None:
            raise UnavailableError(f"where {self.address} is has to be asked first")
        family, where = self._resolved
        stream = _prepared(family)
        try:
            _patient(stream)
            code = stream.connect_ex(where)
            if code not in (0, errno.EINPROGRESS):
                raise UnavailableError(f"{self.address} does not answer: {os.strerror(code)}")
            return TlsStream(stream, self._context, host=self.address.host)
        except BaseException:
            stream.close()
            raise

    def __str__(self) -> str:
        return str(self.address)


Place = Path | Remote
"""Where a daemon is: the home that it serves on this machine, or another machine."""


def place_of(config: StoreConfig) -> Place:
    """Where the daemon of a configuration is."""
    return Remote(config) if config.connect else config.home_path


def _need_keys(config: StoreConfig, field: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not getattr(config, name)]
    if missing:
        raise ConfigError(
            f"{field} {getattr(config, field)} needs {', '.join(missing)}: without keys on both "
            "sides everybody who reaches the port could read and change all prompts. "
            "docs/design/security.md#between-hosts shows how to make them"
        )
