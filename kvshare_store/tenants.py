"""Salts that prove their tenant: `NAME.MAC`, made with a key that clients do not have.

Without `tenant_key` any `cache_salt` counts as the tenant's name, so whoever can set it can reuse
and fill every tenant's rows. docs/design/security.md says who should hold the key.
"""

from __future__ import annotations

import hmac

from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.keys import master_key

UNPROVEN = "tenant_unproven"
"""Why a request without such a salt is neither looked up nor stored."""
_CONTEXT = b"kvshare tenant "
_LONGEST_SALT = 128
_FORBIDDEN = "@/\\\0"
"""vLLM refuses a request whose `cache_salt` is longer or holds one of these."""
_MAC_CHARACTERS = 64
LONGEST_NAME = _LONGEST_SALT - _MAC_CHARACTERS - len(".")


class Tenants:
    """Whose request it is, by its salt. `ConfigError` if the key cannot be had."""

    def __init__(self, config: StoreConfig) -> None:
        self._key = master_key(config.tenant_key, "tenant_key") if config.tenant_key else None

    def of(self, salt: str) -> str | None:
        """The tenant's name, empty for nobody in particular; None if the salt proves none."""
        if self._key is None:
            return salt
        name, dot, mac = salt.rpartition(".")
        proven = dot and name and hmac.compare_digest(_bytes(mac), _mac(self._key, name).encode())
        return name if proven else None

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


def _mac(key: bytes, name: str) -> str:
    """64 hex digits: HMAC-SHA256 of the name in UTF-8, after a word that says what it is for."""
    return hmac.digest(key, _CONTEXT + _bytes(name), "sha256").hex()


def _bytes(text: str) -> bytes:
    """UTF-8, also of half a surrogate pair, which JSON can carry."""
    return text.encode("utf-8", "surrogatepass")
