"""The checks of `kvshare doctor` where `connect` names the daemon of another machine."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from kvshare_store.cli.finding import NOTE, OK, WARNING, WRONG, Finding, health
from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.network import Address, Remote
from kvshare_store.daemon.tls import MUST_HOLD, client_context, reason_of
from kvshare_store.errors import ConfigError, KVShareError
from kvshare_store.errors.wording import os_reason

_PATIENCE_S = 5.0
_DAY_S = 86_400.0
_SOON_DAYS = 30

_MAY = {
    "reader": "may look and load, not save",
    "engine": "may load and save",
    "admin": "may do everything",
}


def findings(config: StoreConfig) -> Iterator[Finding]:
    """Keys, address, certificates, role and health, in the order in which one needs the other."""
    try:
        far = Remote(config)
    except ConfigError as error:
        yield Finding(WRONG, "keys", str(error), "how to make keys: docs/design/security.md")
        return
    yield _ours(Path(config.tls_cert).expanduser())
    try:
        stream = _connected(far.address)
    except (KVShareError, OSError) as error:
        advice = "is the daemon up, is its `listen` that address, is there a firewall between?"
        why = f"{far.address} cannot be reached: {os_reason(error)}"
        yield Finding(WRONG, "address", why, advice)
        return
    yield Finding(OK, "address", f"{far.address} can be reached")
    theirs = _theirs(config, far.address, stream)
    yield theirs
    if theirs.state != WRONG:
        yield from _daemon(far)


def _connected(address: Address) -> socket.socket:
    family, where = address.resolved()
    stream = socket.socket(family, socket.SOCK_STREAM)
    try:
        stream.settimeout(_PATIENCE_S)
        stream.connect(where)
    except OSError:
        stream.close()
        raise
    return stream


def _ours(file: Path) -> Finding:
    """The first certificate of the file, which is the one that is shown."""
    what = "our certificate"
    if find_spec("cryptography") is None:
        return Finding(NOTE, what, "its dates are not known without the extra encryption")
    from cryptography import x509  # noqa: PLC0415 - an extra

    shown = x509.load_pem_x509_certificates(file.read_bytes())[0]
    begins, ends = shown.not_valid_before_utc.timestamp(), shown.not_valid_after_utc.timestamp()
    return _dated(what, f"{shown.subject.rfc4514_string()}, ", begins, ends)


def _theirs(config: StoreConfig, address: Address, stream: socket.socket) -> Finding:
    """What the daemon shows, verified; it closes the stream."""
    what, context = "its certificate", client_context(config)
    try:
        with stream, context.wrap_socket(stream, server_hostname=address.host) as tls:
            shown = tls.getpeercert() or {}
    except OSError as error:
        why = reason_of(error) if isinstance(error, ssl.SSLError) else str(error)
        return Finding(WRONG, what, why, MUST_HOLD)
    begins, ends = (ssl.cert_time_to_seconds(str(shown[at])) for at in ("notBefore", "notAfter"))
    return _dated(what, f"vouched for, names {address.host}, ", begins, ends)


def _dated(what: str, about: str, begins: float, ends: float) -> Finding:
    now = time.time()
    date = time.strftime("%Y-%m-%d", time.localtime(ends))
    if now < begins:
        return Finding(WRONG, what, f"{about}not yet in date", "look at this machine's clock")
    if ends < now:
        return Finding(WRONG, what, f"{about}out of date since {date}", "make a new one")
    days = int((ends - now) / _DAY_S)
    found = f"{about}good until {date}, {days:,} days"
    if days < _SOON_DAYS:
        return Finding(WARNING, what, found, "make a new one before")
    return Finding(OK, what, found)


def _daemon(far: Remote) -> Iterator[Finding]:
    try:
        with Client(far) as client:
            role = client.greet().role
            stats = client.call(protocol.Stats())
    except KVShareError as error:
        yield Finding(WRONG, "daemon", str(error), "its log says why it refuses us")
        return
    yield Finding(OK, "role", f"{role}: {_MAY[role]}")
    yield from health(stats)
