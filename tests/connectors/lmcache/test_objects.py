"""How an LMCache object is represented in the store, without LMCache."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvshare_connectors.lmcache.objects import (
    MODEL,
    ROWS,
    Parts,
    key_of,
    layout_of,
    nbytes_of,
    parts_of,
    place_of,
)
from kvshare_connectors.lmcache.sizes import Sizes, described_bytes

from kvshare_store.config import StoreConfig
from kvshare_store.errors import UnsupportedError
from kvshare_store.namespace import Tenants

TENANTS = Tenants(StoreConfig())
KEYS = st.builds(
    Parts,
    st.binary(min_size=1, max_size=ROWS - 1),
    st.text("abc/-_.", min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
    st.text("xyz ", max_size=6),
)


def place(key: Parts, nbytes: int, tenants: Tenants = TENANTS):  # type: ignore[no-untyped-def]
    found = place_of(key, nbytes, tenants)
    assert found is not None
    return found


@given(KEYS, st.integers(0, 1 << 20))
def test_a_key_is_read_back_from_its_node(key: Parts, nbytes: int) -> None:
    there = place(key, nbytes)
    assert key_of(there.namespace, there.tokens.tobytes(), TENANTS) == key
    assert nbytes_of(there.namespace) == nbytes


@given(KEYS, KEYS, st.integers(0, 4096), st.integers(0, 4096))
def test_other_keys_and_other_sizes_are_other_nodes(a: Parts, b: Parts, n: int, m: int) -> None:
    assert (place(a, n).node == place(b, m).node) == ((a, n) == (b, m))


@given(st.binary(max_size=3000), st.integers(1, ROWS))
def test_blocks_hold_the_object_and_less_than_256_bytes_more(data: bytes, rows: int) -> None:
    full, rest = divmod(ROWS, rows)
    sizes = (rows,) * full + ((rest,) if rest else ())
    there = place(Parts(b"hash", "model", 0, 0, ""), len(data))
    joined = b"".join(map(bytes, there.blocks(memoryview(data), sizes)))
    assert joined[: len(data)] == data
    assert len(joined) == ROWS * layout_of(len(data)).row_bytes < max(len(data), 1) + 256


def test_no_engine_shares_a_namespace_with_objects() -> None:
    assert place(Parts(b"hash", "model", 0, 0, ""), 512).namespace.model == f"{MODEL}model"


def test_a_hash_that_cannot_be_kept_is_refused() -> None:
    place(Parts(b"h" * (ROWS - 1), "model", 0, 0, ""), 512)
    with pytest.raises(UnsupportedError, match="64 bytes"):
        place(Parts(b"h" * ROWS, "model", 0, 0, ""), 512)


def test_a_salt_must_prove_its_tenant_where_there_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANTS", "ab" * 32)
    keyed = Tenants(StoreConfig(tenant_key="env:TENANTS"))
    salted = Parts(b"hash", "model", 0, 0, keyed.salt("ann"))
    there = place(salted, 512, keyed)
    assert there.namespace.tenant == "ann"
    assert key_of(there.namespace, there.tokens.tobytes(), keyed) == salted
    assert place_of(salted._replace(cache_salt="ann"), 512, keyed) is None


def test_a_key_of_an_older_lmcache_has_no_group_and_no_salt() -> None:
    class Old:
        chunk_hash, model_name, kv_rank = b"hash", "model", 7

    assert parts_of(Old()) == Parts(b"hash", "model", 7, 0, "")


def test_sizes_are_learned_and_described() -> None:
    class Dtype:
        itemsize = 2

    class Layout:
        shapes, dtypes = [(2, 3), (4,)], [Dtype(), Dtype()]

    sizes, key = Sizes(), Parts(b"hash", "model", 7, 1, "")
    assert sizes.of(key, None) == set()
    assert sizes.of(key, {0: Layout()}) == set()
    assert sizes.of(key, {1: Layout()}) == {20}
    sizes.learn(key, 33)
    assert sizes.of(key._replace(chunk_hash=b"other"), {1: Layout()}) == {20, 33}
    assert sizes.of(key._replace(kv_rank=8), None) == set()
    assert described_bytes(None) == 0
