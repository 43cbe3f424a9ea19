"""Keys that tests make and throw away."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from kvshare_store.config import StoreConfig

_DAY = datetime.timedelta(days=1)


class Pair(NamedTuple):
    """Files of a certificate and its key."""

    cert: str
    key: str


class Authority:
    """Somebody whose word counts: what it issues is let in by whoever has its `cert`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = generate_private_key(SECP256R1())
        self._name = _name(name)
        self._made = 0
        made = self._certificate(self._name, self._key, authority=True, days=(-1, 30))
        self.cert = self._written(f"{name}.pem", made.public_bytes(Encoding.PEM))

    def issue(
        self, name: str, unit: str = "", *, host: str = "127.0.0.1", expired: bool = False
    ) -> Pair:
        """A certificate for a name and an organizational unit, good for a host."""
        key = generate_private_key(SECP256R1())
        days = (-3, -1) if expired else (-1, 30)
        made = self._certificate(_name(name, unit), key, host=host, days=days)
        self._made += 1
        stem = f"{name}-{self._made}"
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Pair(
            self._written(f"{stem}.pem", made.public_bytes(Encoding.PEM)),
            self._written(f"{stem}.key", secret),
        )

    def _certificate(
        self,
        subject: x509.Name,
        key: EllipticCurvePrivateKey,
        *,
        host: str = "",
        authority: bool = False,
        days: tuple[int, int],
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * _DAY)
            .not_valid_after(now + days[1] * _DAY)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if host:
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
            made = made.add_extension(names, critical=False)
        return made.sign(self._key, SHA256())

    def _written(self, name: str, data: bytes) -> str:
        path = self._folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return str(path)


class Keys:
    """Those of one daemon and its clients."""

    def __init__(self, folder: Path) -> None:
        self.servers, self.clients = Authority(folder, "servers"), Authority(folder, "clients")
        self.strangers = Authority(folder, "strangers")
        self.server = self.servers.issue("daemon")
        self.port = free_port()
        """For a daemon whose clients must know it before it starts."""

    def listening(self, **changes: Any) -> dict[str, Any]:
        """Settings of the daemon."""
        return {
            "listen": "tcp://127.0.0.1:0",
            "tls_cert": self.server.cert,
            "tls_key": self.server.key,
            "tls_clients": self.clients.cert,
        } | changes

    def client(self, pair: Pair, port: int, **changes: Any) -> StoreConfig:
        """Settings of a client that shows a certificate."""
        return StoreConfig(**{
            "home": "/nonexistent", "connect": f"tcp://127.0.0.1:{port}", "tls_cert": pair.cert,
            "tls_key": pair.key, "tls_server": self.servers.cert,
        } | changes)  # fmt: skip


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _name(name: str, unit: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if unit:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(parts)
