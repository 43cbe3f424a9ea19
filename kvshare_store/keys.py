"""Keys for encryption at rest and in remotes, made of a master key, and AES-256-GCM under them.

docs/design/encryption.md says what is covered, what stays in clear, and why.
"""

from __future__ import annotations

import os
from typing import Any

from kvshare_store.errors import CorruptBlockError, NamespaceError, UnsupportedError
from kvshare_store.errors.wording import short

_KEY_BYTES = 32
SALT_BYTES = 32
NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""How many bytes longer an encrypted text is than the plain one: its nonce and its tag."""


class Keyring:
    """Keys derived from a master key, one for each namespace and purpose. Thread-safe.

    A namespace's key is HKDF-SHA256 of the master key with the namespace's own random salt. When
    that salt is deleted nobody can derive the key again, not even with the master key. After the
    master key was changed, the namespace's key is kept in place of the salt, sealed (`wrapped`).
    """

    def __init__(self, master: bytes) -> None:
        _aesgcm()  # says at once when the library is missing
        self._master = master
        self._keys: dict[str, bytes] = {}

    def learn(self, namespace: str, salt: bytes) -> None:
        """Learn the key of a namespace from its salt, or from what `wrapped` has made;
        `CorruptBlockError` if that was made with another master key."""
        if is_salt(salt):
            self._keys[namespace] = self._derive(salt, f"namespace {namespace}")
            return
        wrapping = self._wrapping(namespace, salt[:SALT_BYTES])
        self._keys[namespace] = bytes(unseal(wrapping, salt[SALT_BYTES:], namespace.encode()))

    def wrapped(self, namespace: str, key: bytes) -> bytes:
        """What takes the place of a namespace's salt where its key was made of another master key:
        a new salt, and that key, sealed."""
        salt = new_salt()
        return salt + bytes(seal(self._wrapping(namespace, salt), key, namespace.encode()))

    def _wrapping(self, namespace: str, salt: bytes) -> bytes:
        return self._derive(salt, f"wrapped namespace {namespace}")

    def forget(self, namespace: str) -> None:
        """Forget the key of a namespace; unknown ones are ignored."""
        self._keys.pop(namespace, None)

    def __contains__(self, namespace: str) -> bool:
        return namespace in self._keys

    def __call__(self, namespace: str) -> bytes:
        """The key of a namespace; `NamespaceError` if its salt is unknown or was deleted."""
        key = self._keys.get(namespace)
        if key is None:
            raise NamespaceError(f"namespace {short(namespace)} has no key")
        return key

    def of_table(self, purpose: str) -> bytes:
        """A key for what belongs to no namespace, such as the list of namespaces."""
        return self._derive(None, f"table {purpose}")

    def _derive(self, salt: bytes | None, info: str) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - an extra

        return HKDF(SHA256(), _KEY_BYTES, salt, f"kvshare {info}".encode()).derive(self._master)


def seal(key: bytes, text: Any, associated: bytes) -> bytearray:
    """Encrypt a text: nonce, ciphertext and tag.

    Nonces are random. After 2**32 texts under one key the probability that two have the same nonce
    is still below 2**-32.
    """
    size = memoryview(text).nbytes
    sealed = bytearray(size + SEAL_BYTES)
    sealed[:NONCE_BYTES] = nonce = os.urandom(NONCE_BYTES)
    _aesgcm()(key).encrypt_into(nonce, text, associated, memoryview(sealed)[NONCE_BYTES:])
    return sealed


def unseal(key: bytes, sealed: Any, associated: bytes) -> bytearray:
    """Decrypt what `seal` has made. `CorruptBlockError` if the key, the associated data or any bit
    is wrong."""
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

    view = memoryview(sealed)
    if view.nbytes < SEAL_BYTES:
        raise CorruptBlockError(f"{view.nbytes} bytes are too few for anything encrypted")
    text = bytearray(view.nbytes - SEAL_BYTES)
    try:
        _aesgcm()(key).decrypt_into(view[:NONCE_BYTES], view[NONCE_BYTES:], associated, text)
    except InvalidTag as error:
        raise CorruptBlockError("encrypted bytes are damaged, swapped or of another key") from error
    return text


def new_salt() -> bytes:
    """A salt for a namespace."""
    return os.urandom(SALT_BYTES)


def is_salt(stored: bytes) -> bool:
    """Whether a record has a salt, or what `Keyring.wrapped` has made in its place."""
    return len(stored) == SALT_BYTES


def _aesgcm() -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UnsupportedError(
            "encryption needs a library: pip install 'kvshare-store[encryption]'"
        ) from error
    return AESGCM
