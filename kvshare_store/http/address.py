"""Where the daemon listens for HTTP, and who may ask there: decided before it starts."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import NamedTuple

from kvshare_store.config import StoreConfig, private_file
from kvshare_store.errors import ConfigError

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[^\[\]:]+)):(?P<port>\d{1,5})")
_SHORTEST_TOKEN = 16
BACKLOG = 128


class Address(NamedTuple):
    """An IP address and a port; 0: any that is free."""

    host: str
    port: int

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        """What a browser on this machine opens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"


class Entrance(NamedTuple):
    """A socket that listens, and what whoever comes in must have."""

    listener: socket.socket
    token: str

    @property
    def address(self) -> Address:
        """Where it is."""
        return Address(*self.listener.getsockname()[:2])


def entrance(config: StoreConfig) -> Entrance:
    """What the settings ask for; `ConfigError` if it cannot be had, or would let everybody in."""
    address = parse_address(config.http)
    token = token_of(config, address)
    return Entrance(listening_socket(address), token)


def parse_address(text: str) -> Address:
    """`127.0.0.1:8470`, `[::1]:8470` or `localhost:8470`; `ConfigError` for anything else."""
    match = _ADDRESS.fullmatch(text.strip())
    host = "" if match is None else match["six"] or match["host"]
    try:
        host = str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
    except ValueError as error:
        raise ConfigError(f"http: {text!r} is no address; write 127.0.0.1:8470") from error
    port = int(match["port"]) if match is not None else 0
    if port > 65535:
        raise ConfigError(f"http: there is no port {port}; the highest is 65535")
    return Address(host, port)


def token_of(config: StoreConfig, address: Address) -> str:
    """The token that whoever asks must have, or empty: then only this machine is listened to.

    `ConfigError` without a token for an address that others reach, or for a file that is none.
    """
    if not config.http_token:
        if not address.local:
            raise ConfigError(
                f"http: others reach {address.host}, and the page shows stored prompts. Listen on "
                "127.0.0.1, or put a token into a file of mode 0600 and name it: "
                "http_token=FILE (head -c 32 /dev/urandom | base64 > FILE; chmod 600 FILE)"
            )
        return ""
    path = Path(config.http_token)
    try:
        token = private_file(path).decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"http_token: {path} holds more than plain characters") from error
    except ConfigError as error:
        raise ConfigError(f"http_token: {error}") from error
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"http_token: {path} must hold one word of at least {_SHORTEST_TOKEN} characters; "
            f"head -c 32 /dev/urandom | base64 > {path} makes one"
        )
    return token


def listening_socket(address: Address) -> socket.socket:
    """A socket that listens there; `ConfigError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address.host, address.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"http: {address.host}:{address.port} cannot be listened to: {error.strerror}; "
            "choose another port"
        ) from error
    listener.setblocking(False)
    return listener
