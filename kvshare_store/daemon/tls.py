"""TLS between a daemon and clients on other machines: both sides show a certificate, or nothing is
said. The client's certificate says what it may ask for.

The role is the organizational unit (OU) of the certificate's subject, or what a file of
`common name: role` lines (`tls_roles`) says of its common name.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from typing import Any, cast

from kvshare_store.config import StoreConfig, read_yaml
from kvshare_store.daemon.protocol import Role
from kvshare_store.daemon.roles import ROLES
from kvshare_store.errors import ConfigError, DeniedError
from kvshare_store.errors.wording import os_reason

_RECORD_BYTES = 1 << 14
"""Longest record of TLS."""
_SENT_BYTES = 1 << 17
"""One call sends no more."""
_READ_BYTES = 1 << 16
"""Taken from the system by one call, at most."""
_TALK_BYTES = 2 * _RECORD_BYTES
"""Of TLS's own talk, after the handshake and in a row. Nobody has to say so much."""
_UNREAD_RECORDS = 16


class TlsStream:
    """A connection with TLS that never waits. It is used as a non-blocking socket is:
    `BlockingIOError` where a call would wait, no bytes at the end of the stream.

    TLS gets only what one call has taken from the system. Left to read for itself, it would go on
    as long as more of its own talk comes, such as new keys again and again, and keep the thread.
    """

    def __init__(
        self,
        stream: socket.socket,
        context: ssl.SSLContext,
        *,
        server: bool = False,
        host: str = "",
        peer: str = "",
    ) -> None:
        """`stream`: not blocking, and connected soon. `server`: this is the side that says why it
        hangs up. `host`: else, whom the other side must prove to be. `peer`: address of the other
        side, for the log."""
        self._stream = stream
        self.peer = peer
        self._server = server
        self._come, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._come, self._going, server_side=server, server_hostname=host or None
        )
        self._room = bytearray(_READ_BYTES + _RECORD_BYTES)
        self._shaken = False
        self._talk = 0
        """Bytes that have come since the last that were for us."""
        self._unsent = memoryview(b"")
        """What TLS has made, and the system has not taken yet."""
        self._sending = 0
        """Bytes of ours that are in it."""
        self.waits_to_read = False
        """Nothing can be sent before something is received."""

    def recv(self, nbytes: int) -> bytes:
        """As a socket's; also what TLS holds back, so up to a record more."""
        data = self._stream.recv(min(nbytes, _READ_BYTES))
        if not data:
            return b""
        self._come.write(data)
        self._shake()
        return self._opened(len(data))

    def _opened(self, nbytes: int) -> bytes:
        """What is for us in `nbytes` bytes that have come, and what they complete."""
        room, at = memoryview(self._room), 0
        try:
            while count := cast("int", self._tls.read(len(room) - at, room[at:])):
                at += count
        except ssl.SSLWantReadError as error:
            self._talk = 0 if at else self._talk + nbytes
            if self._talk > _TALK_BYTES:
                raise ssl.SSLError(ssl.SSL_ERROR_SSL, "nothing but TLS's own talk") from error
            if not at:
                raise BlockingIOError from error
        return bytes(room[:at])

    def send(self, data: memoryview) -> int:
        """As a socket's. After `BlockingIOError` it wants the same bytes again, which whoever moves
        frames does: they are in a record already."""
        self._shake()
        while self._sending < len(data[:_SENT_BYTES]) and not self._unsent:
            self._sending += self._tls.write(data[self._sending : _SENT_BYTES])
        self._flush()
        sent, self._sending = self._sending, 0
        return sent

    def _flush(self) -> None:
        """Send what TLS has made; `BlockingIOError` while the system does not take all of it."""
        while self._unsent or self._going.pending:
            self._unsent = self._unsent or memoryview(self._going.read())
            self._unsent = self._unsent[self._stream.send(self._unsent) :]

    def _shake(self) -> None:
        if self._shaken:
            return
        self.waits_to_read = False
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError as error:
            self._flush()
            self.waits_to_read = True
            raise BlockingIOError from error
        except ssl.SSLError:
            with contextlib.suppress(OSError):  # the other side is told why
                self._flush()
            raise
        self._shaken = True
        with contextlib.suppress(BlockingIOError):
            self._flush()

    def certificate(self) -> dict[str, Any]:
        """What the other side has shown, verified; empty before the handshake is over."""
        return dict(self._tls.getpeercert() or {}) if self._shaken else {}

    def fileno(self) -> int:
        """For whoever waits for it."""
        return self._stream.fileno()

    def setblocking(self, wanted: bool) -> None:
        """It never blocks."""
        if wanted:
            raise ValueError("a TlsStream never blocks")

    def close(self) -> None:
        """Close it; from the server's side so that the client can still read why. A client only
        lets go: a forked child must not end the connection of its parent."""
        if self._server:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)
                for _ in range(_UNREAD_RECORDS):  # what is unread would reset the connection
                    if not self._stream.recv(_RECORD_BYTES):
                        break
        self._stream.close()


def server_context(config: StoreConfig) -> ssl.SSLContext:
    """For a daemon: lets in whoever shows a certificate that `tls_clients` vouches for."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, config, config.tls_clients, "tls_clients")
    # a resumed session would skip the certificate, which may have expired or been taken away
    context.num_tickets = 0
    return context


def client_context(config: StoreConfig) -> ssl.SSLContext:
    """For an engine: talks to the host that it means, for which `tls_server` vouches."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, config, config.tls_server, "tls_server")


def _check_there(field: str, path: str) -> None:
    """`ConfigError` that names the file, which OpenSSL's own error does not."""
    try:
        Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{field} {path} cannot be used: {error.strerror}") from error


def _context(purpose: int, config: StoreConfig, trusted: str, field: str) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    _check_private(Path(config.tls_key).expanduser())
    _check_there("tls_cert", config.tls_cert)
    try:
        context.load_cert_chain(
            Path(config.tls_cert).expanduser(), Path(config.tls_key).expanduser(), _no_password
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls_cert and tls_key cannot be used: {_reason(error)}") from error
    try:
        context.load_verify_locations(Path(trusted).expanduser())
    except OSError as error:
        raise ConfigError(f"{field} {trusted} cannot be used: {_reason(error)}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key has a password; store it without one, readable by its owner only")


def _check_private(key: Path) -> None:
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise ConfigError(f"tls_key {key} cannot be read: {error.strerror}") from error
    if mode & 0o007:
        raise ConfigError(f"tls_key {key} can be read by everybody: chmod 600 {key}")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or os_reason(error))


MUST_HOLD = (
    "the name in connect must be in the subjectAltName of the daemon's certificate, tls_server "
    "must vouch for its certificate, the daemon's tls_clients for ours, and both must be in date"
)
"""What a client without a connection should look at."""


def reason_of(error: ssl.SSLError) -> str:
    """Why there is no TLS, as the library says it."""
    why = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error.strerror
    return str(why).rstrip(".")


# --- roles ------------------------------------------------------------------------------------


class Roles:
    """What each certificate may ask for."""

    def __init__(self, file: str) -> None:
        """`file`: YAML of `common name: role`, or empty: the subject says it."""
        self._by_name = _read_roles(Path(file).expanduser()) if file else None

    def of(self, certificate: dict[str, Any]) -> Role:
        """`DeniedError` for a certificate without a role."""
        subject = dict(part[0] for part in certificate.get("subject", ()))
        name, unit = subject.get("commonName", ""), subject.get("organizationalUnitName", "")
        if self._by_name is not None:
            role = self._by_name.get(name)
            said = f"tls_roles gives the common name {name!r} no role"
        else:
            role = unit if unit in ROLES else None
            said = f"the subject of {name!r} has the unit {unit!r}, which is no role"
        if role is None:
            raise DeniedError(f"{said}: reader, engine and admin are roles")
        return role


def _read_roles(path: Path) -> dict[str, Role]:
    wrong = "must hold 'common name: role' lines"
    roles: dict[str, Role] = read_yaml(path, "tls_roles", wrong, dict[str, Role])
    return roles
