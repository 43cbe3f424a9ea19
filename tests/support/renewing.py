"""A client that renews the keys of its TLS connection again and again, which `ssl` cannot be asked
for: by the OpenSSL below it."""

from __future__ import annotations

import _ssl
import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.certificates import Pair

_TAKES: dict[str, tuple[type, ...]] = {
    "SSL_CTX_new": (),
    "SSL_CTX_free": (),
    "SSL_CTX_use_certificate_file": (ctypes.c_char_p, ctypes.c_int),
    "SSL_CTX_use_PrivateKey_file": (ctypes.c_char_p, ctypes.c_int),
    "SSL_new": (),
    "SSL_free": (),
    "SSL_set_fd": (ctypes.c_int,),
    "SSL_connect": (),
    "SSL_write": (ctypes.c_char_p, ctypes.c_int),
    "SSL_key_update": (ctypes.c_int,),
    "SSL_do_handshake": (),
}
"""What functions take, behind a pointer."""
_PEM = 1


class Renewing:
    """One connection, the handshake made."""

    def __init__(self, library: ctypes.CDLL, ssl: int) -> None:
        self._library = library
        self._ssl = ssl

    def write(self, data: bytes) -> bool:
        """Whether it could be sent."""
        return bool(self._library.SSL_write(self._ssl, data, len(data)) == len(data))

    def renew(self) -> bool:
        """Say that other keys count from now on; False once the connection is gone."""
        renewed = self._library.SSL_key_update(self._ssl, 0) == 1
        return bool(renewed and self._library.SSL_do_handshake(self._ssl) == 1)


@contextmanager
def renewing(port: int, pair: Pair) -> Iterator[Renewing]:
    """Connect to a port of this machine with a certificate; whoever is there is believed."""
    library = ctypes.CDLL(_ssl.__file__)  # and what it is linked with
    for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
        getattr(library, name).restype = ctypes.c_void_p
    for name, more in _TAKES.items():
        getattr(library, name).argtypes = [ctypes.c_void_p, *more]
    context = library.SSL_CTX_new(library.TLS_client_method())
    try:
        assert library.SSL_CTX_use_certificate_file(context, pair.cert.encode(), _PEM) == 1
        assert library.SSL_CTX_use_PrivateKey_file(context, pair.key.encode(), _PEM) == 1
        ssl = library.SSL_new(context)
        with socket.create_connection(("127.0.0.1", port)) as stream:
            try:
                library.SSL_set_fd(ssl, stream.fileno())
                assert library.SSL_connect(ssl) == 1
                yield Renewing(library, ssl)
            finally:
                library.SSL_free(ssl)
    finally:
        library.SSL_CTX_free(context)
