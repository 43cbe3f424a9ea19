"""What opens what a key sealed, and which key a namespace has."""

from __future__ import annotations

import pytest

from kvshare_store.errors import CorruptBlockError, NamespaceError
from kvshare_store.keys import SEAL_BYTES, Keyring, new_salt, seal, unseal

KEY = bytes(range(100, 132))
OTHER = bytes(32)
TEXT, ABOUT = b"rows of one tenant", b"name and namespace"


# --- seals --------------------------------------------------------------------------------------


def test_what_is_sealed_opens_with_the_same_key_and_associated_data() -> None:
    sealed = seal(KEY, TEXT, ABOUT)
    assert len(sealed) == len(TEXT) + SEAL_BYTES
    assert TEXT not in sealed
    assert bytes(unseal(KEY, sealed, ABOUT)) == TEXT
    assert seal(KEY, TEXT, ABOUT) != sealed, "a nonce is never used twice"


@pytest.mark.parametrize(("key", "about"), [(OTHER, ABOUT), (KEY, b"another name")])
def test_another_key_or_other_associated_data_open_nothing(key: bytes, about: bytes) -> None:
    with pytest.raises(CorruptBlockError):
        unseal(key, seal(KEY, TEXT, ABOUT), about)


def test_any_flipped_bit_and_any_cut_is_noticed() -> None:
    sealed = bytes(seal(KEY, TEXT, ABOUT))
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptBlockError):
            unseal(KEY, damaged, ABOUT)
    for length in range(len(sealed)):
        with pytest.raises(CorruptBlockError):
            unseal(KEY, sealed[:length], ABOUT)


# --- keys of namespaces -------------------------------------------------------------------------


def test_each_namespace_has_a_key_of_its_own_until_its_salt_is_forgotten() -> None:
    ring, salt = Keyring(KEY), new_salt()
    ring.learn("one", salt)
    ring.learn("two", salt)
    first = ring("one")
    assert "one" in ring
    assert len({bytes(first), bytes(ring("two")), ring.of_table("namespaces"), KEY}) == 4
    ring.forget("one")
    with pytest.raises(NamespaceError, match="has no key"):
        ring("one")
    ring.learn("one", new_salt())
    assert ring("one") != first, "another salt is another key"


def test_the_same_master_key_and_salt_give_the_same_key_everywhere() -> None:
    salt, keys = new_salt(), set()
    for master in (KEY, KEY, OTHER):
        ring = Keyring(master)
        ring.learn("one", salt)
        keys.add(ring("one"))
    assert len(keys) == 2
