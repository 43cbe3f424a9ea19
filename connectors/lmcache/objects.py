"""How an object of LMCache's is stored: as a node of 64 rows whose tokens spell its key.

The store does not look into the bytes. A node's id follows from key and size, so whoever has the
key finds the object without a directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from kvshare_store.errors import UnsupportedError
from kvshare_store.namespace import Namespace, Tenants
from kvshare_store.nodes.edits import Tokens
from kvshare_store.nodes.node import node_id
from kvshare_store.tensors.layout import KVLayout

ROWS = 64
"""Rows of every object, whatever its size: one row is a 64th of it."""
MODEL = "lmcache:"
"""A prefix of the model's name in every namespace of such objects, so that no engine shares it."""
_ELEMENT = 4
"""Bytes of K and V of the smallest row: one element of two bytes each."""
_HASH_BYTES = ROWS - 1


class Key(Protocol):
    """What is read of LMCache's `ObjectKey`."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int


class Parts(NamedTuple):
    """The fields of a key, without LMCache."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int
    cache_salt: str


class Place(NamedTuple):
    """Where an object belongs: what its node is made of."""

    namespace: Namespace
    tokens: Tokens
    nbytes: int

    @property
    def node(self) -> str:
        """The id of its node."""
        return node_id(self.namespace.digest, self.tokens, True)

    def blocks(self, data: memoryview, sizes: tuple[int, ...]) -> Iterator[bytes | memoryview]:
        """The object cut into blocks of `sizes` rows; the last one is filled up with zeros."""
        at = 0
        for rows in sizes:
            nbytes = rows * self.namespace.layout.row_bytes
            part = data[at : at + nbytes]
            yield part if len(part) == nbytes else bytes(part).ljust(nbytes, b"\0")
            at += nbytes


def parts_of(key: Key) -> Parts:
    """The fields of a key; those that an older LMCache does not have are at their defaults."""
    group = int(getattr(key, "object_group_id", 0))
    salt = str(getattr(key, "cache_salt", ""))
    return Parts(bytes(key.chunk_hash), key.model_name, key.kv_rank, group, salt)


def place_of(key: Parts, nbytes: int, tenants: Tenants) -> Place | None:
    """Where an object of `nbytes` bytes belongs; None if its salt proves no tenant.

    `UnsupportedError` for a chunk hash that is too long to be kept.
    """
    tenant = tenants.of(key.cache_salt)
    if tenant is None:
        return None
    namespace = Namespace(
        model=f"{MODEL}{key.model_name}",
        layout=layout_of(nbytes),
        kv_dtype=f"{nbytes} bytes",
        ranks=ranks_of(key),
        tenant=tenant,
    )
    return Place(namespace, tokens_of(key.chunk_hash), nbytes)


def layout_of(nbytes: int) -> KVLayout:
    """Rows of which `ROWS` hold so many bytes, and less than 256 more."""
    return KVLayout(1, 1, max(1, -(-nbytes // (ROWS * _ELEMENT))), "bfloat16")


def ranks_of(key: Parts) -> str:
    """Which slice of the model's KV it is."""
    return f"rank {key.kv_rank:#x} group {key.object_group_id}"


def tokens_of(chunk_hash: bytes) -> Tokens:
    """A prompt that spells the hash: its length, its bytes, zeros."""
    if len(chunk_hash) > _HASH_BYTES:
        raise UnsupportedError(
            f"a chunk hash of {len(chunk_hash)} bytes: at most {_HASH_BYTES} can be kept"
        )
    tokens = np.zeros(ROWS, np.int32)
    tokens[0] = len(chunk_hash)
    tokens[1 : 1 + len(chunk_hash)] = np.frombuffer(chunk_hash, np.uint8)
    return tokens


def nbytes_of(namespace: Namespace) -> int:
    """The size of a namespace's objects."""
    return int(namespace.kv_dtype.partition(" ")[0])


def key_of(namespace: Namespace, tokens: bytes, tenants: Tenants) -> Parts:
    """The key of a stored object; `tokens`: int32."""
    spelled = np.frombuffer(tokens, np.int32)
    _, rank, _, group = namespace.ranks.split(" ")
    return Parts(
        chunk_hash=spelled[1 : 1 + spelled[0]].astype(np.uint8).tobytes(),
        model_name=namespace.model.removeprefix(MODEL),
        kv_rank=int(rank, 16),
        object_group_id=int(group),
        cache_salt=salt_of(namespace, tenants),
    )


def salt_of(namespace: Namespace, tenants: Tenants) -> str:
    """The `cache_salt` of a namespace's tenant."""
    tenant = namespace.tenant
    return tenants.salt(tenant) if tenant and tenants.keyed else tenant
