"""What a row of the catalogue says: nodes and namespaces as bytes, sealed where there are keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvshare_store.errors import ConfigError, CorruptBlockError
from kvshare_store.keys import Keyring, new_salt, seal, unseal
from kvshare_store.namespace import Namespace
from kvshare_store.tree.node import Node


class Vectors(NamedTuple):
    """What nominates a node: float32 unit vectors of 384 numbers; no semantic one may be known."""

    lexical: np.ndarray
    semantic: np.ndarray | None


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    """What of a node's row is encrypted: the node, and its vectors as float32."""

    node: Node
    lexical: bytes
    semantic: bytes | None


class Rows:
    """Packs and unpacks rows. With `keys`, only ids, digests and salts are in clear."""

    def __init__(self, keys: Keyring | None) -> None:
        self._keys = keys

    def node_row(self, node: Node, vectors: Vectors) -> dict[str, Any]:
        """The row of a node; a sealed one has its vectors inside."""
        row: dict[str, Any] = {"id": node.id, "namespace": node.namespace, "stamp": node.stamp}
        lexical, semantic = vectors
        if self._keys is None:
            encoded = msgspec.msgpack.encode(node)
            return {**row, "node": encoded, "lexical": lexical, "semantic": semantic}
        inside = _Sealed(node, _raw(lexical), None if semantic is None else _raw(semantic))
        key = self._keys(node.namespace)
        sealed = bytes(seal(key, msgspec.msgpack.encode(inside), _whose(row)))
        return {**row, "node": sealed, "lexical": None, "semantic": None}

    def readable(self, row: dict[str, Any]) -> bool:
        """Whether the key of the row's namespace is known, if one is needed."""
        return self._keys is None or row["namespace"] in self._keys

    def node(self, row: dict[str, Any]) -> tuple[Node, Vectors]:
        """The node of a row and its vectors; `ValueError` if that is not what the row holds."""
        try:
            if self._keys is None:
                node = msgspec.msgpack.decode(row["node"], type=Node)
                lexical, semantic = row["lexical"], row["semantic"]
            else:
                text = unseal(self._keys(row["namespace"]), row["node"], _whose(row))
                inside = msgspec.msgpack.decode(text, type=_Sealed)
                node, semantic = inside.node, inside.semantic
                lexical = np.frombuffer(inside.lexical, np.float32)
                semantic = None if semantic is None else np.frombuffer(semantic, np.float32)
        except (msgspec.DecodeError, CorruptBlockError) as error:
            raise ValueError(f"node {row['id'][:12]} is unreadable: {error}") from error
        return node, Vectors(
            np.asarray(lexical, np.float32),
            None if semantic is None else np.asarray(semantic, np.float32),
        )

    def namespace_row(self, namespace: Namespace) -> dict[str, Any]:
        """The row of a namespace, with a new salt where there are keys."""
        digest, encoded = namespace.digest, msgspec.msgpack.encode(namespace)
        if self._keys is None:
            return {"digest": digest, "namespace": encoded, "salt": None}
        sealed = bytes(seal(self._keys.of_table("namespaces"), encoded, digest.encode()))
        return {"digest": digest, "namespace": sealed, "salt": new_salt()}

    def namespace(self, row: dict[str, Any]) -> Namespace:
        """The namespace of a row, whose key is known from then on.

        `ConfigError` if the row was written with another key, or with none.
        """
        encoded = row["namespace"]
        if (self._keys is None) != (row["salt"] is None):
            written = "without" if row["salt"] is None else "with"
            raise ConfigError(f"this store was written {written} an encryption_key and stays so")
        if self._keys is not None:
            key = self._keys.of_table("namespaces")
            try:
                encoded = unseal(key, encoded, row["digest"].encode())
            except CorruptBlockError as error:
                raise ConfigError("encryption_key is not the key of this store") from error
            self._keys.learn(row["digest"], row["salt"])
        return msgspec.msgpack.decode(encoded, type=Namespace)

    def forget(self, namespace: str) -> None:
        """The salt of a namespace is gone, and its key with it."""
        if self._keys is not None:
            self._keys.forget(namespace)


def _raw(vector: np.ndarray) -> bytes:
    return np.asarray(vector, np.float32).tobytes()


def _whose(row: dict[str, Any]) -> bytes:
    """What a sealed node cannot be separated from."""
    return msgspec.msgpack.encode((row["id"], row["namespace"]))
