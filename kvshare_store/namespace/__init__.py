"""Who may share with whom. Namespaces separate rows: lookups filter by them, and they are checked
again when rows are read."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Callable
from typing import Annotated

import blake3
import msgspec

from kvshare_store.config import LONGEST_POOL, StoreConfig, master_key
from kvshare_store.errors import ConfigError
from kvshare_store.tensors.layout import KVLayout

PoolName = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_POOL)]


class Namespace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything two requests must agree on before rows of one may serve the other.

    All fields are compared by equality only; none is interpreted. `tenant` comes from the server
    side (vLLM's `cache_salt`), never from a field that a client can set freely.
    """

    model: str
    layout: KVLayout
    revision: str = ""
    kv_dtype: str = "auto"
    rope: str = ""
    lora: str = ""
    ranks: str = "tp1"
    tenant: str = ""
    tokenizer: str = msgspec.field(default="")
    """A folder with a tokenizer, for display and text embeddings. It is not part of the
    identity."""
    pool: PoolName | msgspec.UnsetType = msgspec.UNSET
    """The pool that this is, which has no tenant. Not sent where it is unset: releases before do
    not know it, and every namespace that is no pool is the same for them."""
    # A field that a later release adds goes below, with a default, and not into `_FIRST_FIELDS`.

    def __post_init__(self) -> None:
        if self.pool and self.tenant:
            raise ConfigError("a pool has no tenant")

    def __reduce__(self) -> tuple[Callable[[bytes], Namespace], tuple[bytes]]:
        """How vLLM hands it to a worker. Pickle names no module for an unset field: it would look
        for one in all that are loaded, and Transformers' import what is not installed."""
        return _unpickled, (msgspec.msgpack.encode(self),)

    @property
    def too_long(self) -> str:
        """The first field with more text than a client may send, empty if there is none. Stored
        namespaces are not checked: one with longer names can still be read and purged."""
        values = ((name, getattr(self, name)) for name in self.__struct_fields__)
        texts = ((name, value) for name, value in values if isinstance(value, str))
        return next((name for name, text in texts if not _fits(name, text)), "")

    @property
    def digest(self) -> str:
        """64 hex digits that name this namespace; the same in every process."""
        return _digest(self)

    @property
    def model_digest(self) -> str:
        """The digest without tenant and adapter: engines with the same one have the same speed."""
        return self.for_tenant("").digest

    @property
    def owner(self) -> str:
        """Whose it is, for people; empty if it is nobody's."""
        return f"pool {self.pool}" if self.pool else f"tenant {self.tenant}" if self.tenant else ""

    def is_of(self, tenant: str | None) -> bool:
        """Whether it is this tenant's. The empty name is that of requests without a tenant, which
        have no pool either."""
        return self.tenant == tenant and not self.pool

    def for_tenant(self, tenant: str, lora: str = "") -> Namespace:
        """The same model for another tenant or adapter. No tenant's name leads to a pool."""
        if tenant == self.tenant and lora == self.lora and not self.pool:
            return self
        return msgspec.structs.replace(self, tenant=tenant, lora=lora, pool=msgspec.UNSET)

    def in_pool(self, pool: str) -> Namespace:
        """The pool of this name for the same model and adapter. No pool's name leads to a
        tenant."""
        return msgspec.structs.replace(self, tenant="", pool=pool)


def _unpickled(encoded: bytes) -> Namespace:
    return msgspec.msgpack.decode(encoded, type=Namespace)


_NAME_BYTES = 1 << 10
_LONGER = {"model": 1 << 12, "tokenizer": 1 << 12, "rope": 1 << 14}
"""Paths, and parameters as JSON."""


def _fits(name: str, text: str) -> bool:
    most = _LONGER.get(name, _NAME_BYTES)
    return len(text) <= most and len(_bytes(text)) <= most


_FIRST_FIELDS = frozenset(
    ("model", "layout", "revision", "kv_dtype", "rope", "lora", "ranks", "tenant", "tokenizer")
)
"""Fields of the first release: always part of what is hashed."""


@functools.lru_cache(maxsize=256)
def _digest(namespace: Namespace) -> str:
    """Fields of later releases are hashed only if they are not at their default. So namespaces keep
    their digest when a release adds a field."""
    wall = msgspec.structs.replace(namespace, tokenizer="")
    fields = {
        field.name: getattr(wall, field.name)
        for field in msgspec.structs.fields(namespace)
        if field.name in _FIRST_FIELDS or getattr(wall, field.name) != field.default
    }
    return blake3.blake3(msgspec.msgpack.encode(fields)).hexdigest()


# --- salts that prove their tenant: `NAME.MAC`, made with a key that clients do not have --------

# Without `tenant_key` any `cache_salt` counts as the tenant's name, so whoever can set it can reuse
# and fill every tenant's rows. docs/design/security.md says who should hold the key.

UNPROVEN = "tenant_unproven"
"""Why a request without such a salt is neither looked up nor stored."""
_CONTEXT = b"kvshare tenant "
_LONGEST_SALT = 128
_FORBIDDEN = "@/\\\0"
"""vLLM refuses a request whose `cache_salt` is longer or holds one of these."""
_MAC_CHARACTERS = 64
SOURCE_BYTES = 8
LONGEST_NAME = _LONGEST_SALT - _MAC_CHARACTERS - len(".")


class Tenants:
    """Tells whose a request is by its salt. `ConfigError` if the key cannot be read."""

    def __init__(self, config: StoreConfig) -> None:
        self._key = master_key(config.tenant_key, "tenant_key") if config.tenant_key else None

    def of(self, salt: str) -> str | None:
        """The tenant's name, empty for requests without a tenant; None if the salt proves no
        tenant."""
        if self._key is None:
            return salt
        name, dot, mac = salt.rpartition(".")
        proven = dot and name and hmac.compare_digest(_bytes(mac), _mac(self._key, name).encode())
        return name if proven else None

    @property
    def keyed(self) -> bool:
        """Whether a salt must prove its tenant."""
        return self._key is not None

    def salt(self, name: str) -> str:
        """The `cache_salt` of this tenant; `ConfigError` without a key, or for a name whose salt
        vLLM would refuse."""
        if self._key is None:
            raise ConfigError("tenant_key is not set: without it the salt is the name itself")
        if not name:
            raise ConfigError("a tenant needs a name")
        if len(name) > LONGEST_NAME or not set(name).isdisjoint(_FORBIDDEN):
            raise ConfigError(
                f"a tenant's name has at most {LONGEST_NAME} characters and none of @ / \\ NUL: "
                "vLLM refuses a longer cache_salt, and one that holds these"
            )
        return f"{name}.{_mac(self._key, name)}"


class Sources:
    """Hashes the names of those who send requests, so that nobody else learns them. `ConfigError`
    if the key cannot be read."""

    def __init__(self, config: StoreConfig) -> None:
        self._key = master_key(config.source_key, "source_key") if config.source_key else None

    def of(self, name: str, namespace: Namespace) -> bytes:
        """The source of that name, as the store knows it: 8 bytes, others in each namespace. Empty
        without a name or a key."""
        if self._key is None or not name:
            return b""
        text = b"kvshare source " + namespace.digest.encode() + _bytes(name)
        return hmac.digest(self._key, text, "sha256")[:SOURCE_BYTES]


def _mac(key: bytes, name: str) -> str:
    """64 hex digits: HMAC-SHA256 of the name in UTF-8, prefixed with a word for the purpose."""
    return hmac.digest(key, _CONTEXT + _bytes(name), "sha256").hex()


def _bytes(text: str) -> bytes:
    """The text in UTF-8, including unpaired surrogates, which JSON can carry."""
    return text.encode("utf-8", "surrogatepass")
