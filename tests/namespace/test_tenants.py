"""Salts that prove their tenant."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Tenants

KEY = bytes(range(32))
NAMES = st.text(st.characters(exclude_characters="@/\\\0"), min_size=1, max_size=63)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    file = tmp_path_factory.mktemp("keys") / "tenants.key"
    file.write_bytes(KEY)
    file.chmod(0o600)
    return Tenants(StoreConfig(tenant_key=f"file:{file}"))


def test_without_a_key_any_salt_is_the_tenant() -> None:
    tenants = Tenants(StoreConfig())
    assert [tenants.of(salt) for salt in ("", "alice", "a.b")] == ["", "alice", "a.b"]
    with pytest.raises(ConfigError, match="tenant_key is not set"):
        tenants.salt("alice")


def test_the_format_that_gateways_make(tenants: Tenants) -> None:
    """As docs/design/security.md has it, with nothing of ours."""
    mac = hmac.new(KEY, b"kvshare tenant alice", hashlib.sha256).hexdigest()
    assert tenants.salt("alice") == f"alice.{mac}"
    assert tenants.of(f"alice.{mac}") == "alice"


@given(name=NAMES, at=st.integers(min_value=0), other=st.characters())
def test_a_salt_with_one_other_sign_proves_nobody(
    tenants: Tenants, name: str, at: int, other: str
) -> None:
    salt = tenants.salt(name)
    assert tenants.of(salt) == name
    at %= len(salt)
    if salt[at] != other:
        assert tenants.of(salt[:at] + other + salt[at + 1 :]) is None


@pytest.mark.parametrize("salt", ["", ".", "alice", "alice.", ".00", "alice.\udcff", "\ud800.00"])
def test_what_is_no_proof(tenants: Tenants, salt: str) -> None:
    assert tenants.of(salt) is None


@pytest.mark.parametrize("name", ["alice@example.com", "org/team", "a\\b", "a\0", "n" * 64])
def test_a_name_whose_salt_engines_refuse_has_none(tenants: Tenants, name: str) -> None:
    with pytest.raises(ConfigError, match=r"at most 63 characters and none of @ / \\ NUL"):
        tenants.salt(name)


def test_nobody_has_no_salt(tenants: Tenants) -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        tenants.salt("")


def test_a_key_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tenant_key: .*absent cannot be read"):
        Tenants(StoreConfig(tenant_key=f"file:{tmp_path / 'absent'}"))
    with pytest.raises(ConfigError, match=r"^tenant_key must be file:PATH"):
        StoreConfig(tenant_key="secret")
