"""Who may share with whom. A namespace is a wall: it filters, and it is checked again on read."""

from __future__ import annotations

import functools

import blake3
import msgspec

from kvshare_store.tensors.layout import KVLayout


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
    """Where a tokenizer for display and text embeddings may be found. Not part of the wall."""
    # A field that a later release adds goes below, with a default, and not into `_FIRST_FIELDS`.

    @property
    def digest(self) -> str:
        """64 hex digits naming this namespace; the same in every process."""
        return _digest(self)

    def for_tenant(self, tenant: str, lora: str = "") -> Namespace:
        """The same model for another tenant or adapter."""
        if tenant == self.tenant and lora == self.lora:
            return self
        return msgspec.structs.replace(self, tenant=tenant, lora=lora)


_FIRST_FIELDS = frozenset(
    ("model", "layout", "revision", "kv_dtype", "rope", "lora", "ranks", "tenant", "tokenizer")
)
"""Fields of the first release: always part of what is hashed."""


@functools.lru_cache(maxsize=4096)
def _digest(namespace: Namespace) -> str:
    """A later field counts only where it is not at its default. So a release that adds one gives
    every older namespace the digest that it always had."""
    wall = msgspec.structs.replace(namespace, tokenizer="")
    fields = {
        field.name: getattr(wall, field.name)
        for field in msgspec.structs.fields(namespace)
        if field.name in _FIRST_FIELDS or getattr(wall, field.name) != field.default
    }
    return blake3.blake3(msgspec.msgpack.encode(fields)).hexdigest()
