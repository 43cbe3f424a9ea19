"""Nodes and namespaces as bytes of catalogue rows, encrypted where there are keys.

Rows are used only after they were verified: docs/design/format.md, "Node row".
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import blake3
import msgspec
import numpy as np

from kvshare_store.errors import (
    ConfigError,
    CorruptBlockError,
    CorruptRowError,
    NewerRowError,
    PlanError,
)
from kvshare_store.errors.wording import short
from kvshare_store.keys import Keyring, is_salt, new_salt, seal, unseal
from kvshare_store.namespace import Namespace
from kvshare_store.nodes.node import NODE_FORMAT, Node, check_node, decode_node, encode_node
from kvshare_store.nodes.vectors import Vectors, is_vector

_CHECK_BYTES = 32
_CHECK_FIELD = b"\xa5check\xc4\x20"
"""MessagePack: the key `check`, then the head of a binary of 32 bytes."""
_SEMANTIC_FIELD = b"\xa8semantic\xc4\x20"
"""The same of the BLAKE3 of the text vector, in the field before."""
_MAP16 = 0xDE
"""MessagePack: a map of more than 15 fields; of fewer the number is in the first byte itself."""


class Row(NamedTuple):
    """A row of the table `nodes` as it was read, not yet verified."""

    id: str
    namespace: str
    node: bytes
    lexical: np.ndarray | None
    semantic: np.ndarray | None


class NamespaceRow(NamedTuple):
    """A row of the table `namespaces`."""

    digest: str
    namespace: bytes
    salt: bytes | None


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    """What of a node's row is encrypted: the node, and its vectors as float32."""

    node: msgspec.Raw
    lexical: bytes
    semantic: bytes | None


class Rows:
    """Packs and unpacks rows. With `keys`, only ids, digests and salts are in clear."""

    def __init__(self, keys: Keyring | None) -> None:
        self._keys = keys
        self._row_bytes: dict[str, int] = {}
        """By namespace whose record was read."""
        self._newer: set[str] = set()
        """Digests of namespaces that only a newer release understands."""

    def node_row(self, node: Node, vectors: Vectors) -> dict[str, Any]:
        """The row of a node; an encrypted one has its vectors inside. A text vector of zeros is
        left out: LanceDB would drop it after the checksum was made."""
        row: dict[str, Any] = {"id": node.id, "namespace": node.namespace, "stamp": node.stamp}
        lexical = vectors.lexical
        semantic = _vector_or_none(vectors.semantic)
        encoded = encode_node(node)
        if self._keys is None:
            checked = _with_check(Row(node.id, node.namespace, encoded, lexical, semantic))
            return {**row, "node": checked, "lexical": lexical, "semantic": semantic}
        inside = _Sealed(
            msgspec.Raw(encoded), _raw(lexical), None if semantic is None else _raw(semantic)
        )
        key = self._keys(node.namespace)
        whose = _whose(node.id, node.namespace)
        sealed = bytes(seal(key, msgspec.msgpack.encode(inside), whose))
        return {**row, "node": sealed, "lexical": None, "semantic": None}

    def node(self, row: Row) -> tuple[Node, Vectors]:
        """The node of a row and its vectors, verified.

        `CorruptRowError` if the row is not what was written, `NewerRowError` if it or its namespace
        means something that this release does not know.
        """
        row_bytes = self._row_bytes.get(row.namespace)
        if row_bytes is None:
            unknown = NewerRowError if row.namespace in self._newer else CorruptRowError
            raise unknown(f"its namespace {short(row.namespace)} is not known")
        if self._keys is not None:
            row = self._unsealed(row, self._keys)
        elif not _check_holds(row):
            raise CorruptRowError("its bytes are not those that were written")
        node = _decoded(row)
        try:
            check_node(node, row_bytes)
        except PlanError as error:
            raise CorruptRowError(str(error)) from error
        return node, _vectors(row)

    def _unsealed(self, row: Row, keys: Keyring) -> Row:
        try:
            text = unseal(keys(row.namespace), row.node, _whose(row.id, row.namespace))
            inside = msgspec.msgpack.decode(text, type=_Sealed)
        except (CorruptBlockError, msgspec.DecodeError) as error:
            raise CorruptRowError(str(error)) from error
        semantic = None if inside.semantic is None else np.frombuffer(inside.semantic, np.float32)
        lexical = np.frombuffer(inside.lexical, np.float32)
        return Row(row.id, row.namespace, bytes(inside.node), lexical, semantic)

    def namespace_row(self, namespace: Namespace) -> dict[str, Any]:
        """The row of a namespace, with a new salt where there are keys."""
        digest, encoded = namespace.digest, msgspec.msgpack.encode(namespace)
        if self._keys is None:
            return {"digest": digest, "namespace": encoded, "salt": None}
        return _record(digest, encoded, new_salt(), self._keys)

    def namespace(self, row: NamespaceRow) -> Namespace:
        """The namespace of a row, whose key and size of rows are known from then on.

        `ConfigError` if the row was written with another key, or with none; `CorruptRowError` and
        `NewerRowError` as for nodes.
        """
        digest, encoded, salt = row
        if (self._keys is None) != (salt is None):
            written = "without" if salt is None else "with"
            raise ConfigError(
                f"this store was written {written} an encryption_key, and that cannot be changed"
            )
        if self._keys is not None:
            encoded = _opened(row, self._keys)
        try:
            namespace = _namespace(digest, encoded)
        except NewerRowError:
            self._newer.add(digest)
            raise
        self._row_bytes[digest] = namespace.layout.row_bytes
        return namespace

    def forget(self, namespace: str) -> None:
        """Forget the salt of a namespace, and with it the key."""
        self._row_bytes.pop(namespace, None)
        if self._keys is not None:
            self._keys.forget(namespace)


# --- encrypted records --------------------------------------------------------------------------


def rekeyed(row: NamespaceRow, old: Keyring, new: Keyring) -> dict[str, Any]:
    """The row of a namespace under another master key. Its own key stays, and so do the blocks and
    rows that are sealed with it. `ConfigError` if `old` is not what it was written with."""
    encoded = _opened(row, old)
    return _record(row.digest, encoded, new.wrapped(row.digest, old(row.digest)), new)


def opens(row: NamespaceRow, keys: Keyring) -> bool:
    """Whether a row was written with this master key."""
    try:
        _opened(row, keys)
    except ConfigError:
        return False
    return True


def _record(digest: str, encoded: bytes, salt: bytes, keys: Keyring) -> dict[str, Any]:
    sealed = bytes(seal(keys.of_table(_purpose(salt)), encoded, digest.encode()))
    return {"digest": digest, "namespace": sealed, "salt": salt}


def _opened(row: NamespaceRow, keys: Keyring) -> bytes:
    """The record in a row, whose namespace has a key from then on."""
    salt = row.salt or b""
    try:
        encoded = bytes(unseal(keys.of_table(_purpose(salt)), row.namespace, row.digest.encode()))
        keys.learn(row.digest, salt)
    except CorruptBlockError as error:
        raise ConfigError("encryption_key is not the key of this store") from error
    return encoded


def _purpose(salt: bytes) -> str:
    """A release that knows only salts is told that it has the wrong key, before it takes all nodes
    for damaged."""
    return "namespaces" if is_salt(salt) else "wrapped namespaces"


def _decoded(row: Row) -> Node:
    try:
        node = decode_node(row.node)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptRowError(f"it is no node: {error}") from error
    if node.format > NODE_FORMAT:
        raise NewerRowError(f"it has format {node.format}, this release reads {NODE_FORMAT}")
    if (node.id, node.namespace) != (row.id, row.namespace):
        raise CorruptRowError(f"it is the row of node {short(node.id)}")
    return node


def _vectors(row: Row) -> Vectors:
    """A node without its text vector is still a donor, so a bad vector costs only itself."""
    if row.lexical is None or not is_vector(row.lexical):
        raise CorruptRowError("its lexical vector is none")
    semantic = _vector_or_none(row.semantic)
    return Vectors(row.lexical, semantic if _semantic_holds(row, semantic) else None)


def _vector_or_none(vector: np.ndarray | None) -> np.ndarray | None:
    return vector if vector is not None and is_vector(vector) else None


# --- the checksum of a row in clear -----------------------------------------------------------


def _with_check(row: Row) -> bytes:
    """The node's bytes, followed by two fields: the hash of the text vector, and the hash of the
    rest of the row."""
    long = row.node[0] == _MAP16
    fields = 2 + (int.from_bytes(row.node[1:3]) if long else row.node[0] & 0x0F)
    head = bytes([0x80 | fields]) if fields <= 15 else struct.pack(">BH", _MAP16, fields)
    body = head + row.node[3 if long else 1 :] + _SEMANTIC_FIELD + _digest_of_vector(row.semantic)
    body += _CHECK_FIELD
    return body + _digest_of(row._replace(node=body), len(body))


def _check_holds(row: Row) -> bool:
    """False if the bytes have changed since the row was written, except for the text vector. Rows
    of the previous release have no such field; their contents are verified all the same. Where the
    hash of the text vector was not written, this check covers the vector too."""
    end = len(row.node) - _CHECK_BYTES
    if not row.node.endswith(_CHECK_FIELD, 0, max(0, end)):
        return True
    return row.node[end:] == _digest_of(row, end)


def _semantic_of(node: bytes, end: int) -> bytes | None:
    """The hash of the text vector in the node's bytes, which precedes `check` and begins before
    `end`; None if there is none."""
    end -= len(_CHECK_FIELD)
    start = end - _CHECK_BYTES
    if start < 0 or not node.endswith(_CHECK_FIELD, 0, end + len(_CHECK_FIELD)):
        return None
    return node[start:end] if node.endswith(_SEMANTIC_FIELD, 0, start) else None


def _semantic_holds(row: Row, semantic: np.ndarray | None) -> bool:
    """Whether a text vector is the one that was written; an encrypted one has been verified
    already."""
    if semantic is None:
        return True
    written = _semantic_of(row.node, max(0, len(row.node) - _CHECK_BYTES))
    return written is None or written == _digest_of_vector(semantic)


def _digest_of_vector(vector: np.ndarray | None) -> bytes:
    return blake3.blake3(b"-" if vector is None else _raw(vector)).digest()


def _digest_of(row: Row, end: int) -> bytes:
    """Of a row with the bytes of the node up to `end`."""
    known = _semantic_of(row.node, end) is not None
    vectors = (row.lexical,) if known else (row.lexical, row.semantic)
    parts = [b"-" if vector is None else _raw(vector) for vector in vectors]
    head = f"kvshare row:{row.id}:{row.namespace}:".encode()
    # in one piece, which is hashed much faster than each part by itself
    return blake3.blake3(b"".join((head, *parts, memoryview(row.node)[:end]))).digest()


def _namespace(digest: str, encoded: bytes) -> Namespace:
    """Decode a record. A field that this release does not know is accepted if the digest is the
    same without it, as it is for a field at its default."""
    unknown: list[str] = []
    try:
        fields = msgspec.msgpack.decode(encoded)
        unknown = [str(name) for name in fields.keys() - set(Namespace.__struct_fields__)]
        known = {name: fields[name] for name in Namespace.__struct_fields__ if name in fields}
        namespace = msgspec.convert(known, Namespace)
    except (ValueError, TypeError, AttributeError) as error:  # msgspec's are ValueErrors
        raise CorruptRowError(f"its record is unreadable: {error}") from error
    if namespace.digest == digest:
        return namespace
    if unknown:
        raise NewerRowError(f"its record has fields of a newer release: {', '.join(unknown)}")
    raise CorruptRowError("its record is that of another namespace")


def _raw(vector: np.ndarray) -> bytes:
    return np.ascontiguousarray(vector, np.float32).tobytes()


def _whose(node: str, namespace: str) -> bytes:
    """The associated data of an encrypted node: it cannot be moved to another row."""
    return msgspec.msgpack.encode((node, namespace))
