"""A namespace is a wall: what is part of it, and that every process draws it the same."""

from __future__ import annotations

import pickle
import subprocess
import sys

import msgspec
import pytest

from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Namespace
from kvshare_store.tensors.layout import KVLayout

NAMESPACE = Namespace(
    "model", KVLayout(2, 1, 4, "float32"), "rev", "fp8", "rope", "lora", "tp2:0", "tenant", "tok"
)
CHANGED = {
    "model": "another",
    "layout": KVLayout(2, 1, 4, "bfloat16"),
    "revision": "another",
    "kv_dtype": "another",
    "rope": "another",
    "lora": "another",
    "ranks": "another",
    "tenant": "another",
}
BEFORE = {
    NAMESPACE: "566a2ba7c42c0809e6c0809be533e9a9a4d1ac7b76874cf0a9c95ef6f19a2311",
    Namespace("m", KVLayout(1, 1, 4, "float32")): (
        "0e6d6a8ef6a9541fb12f6d8a442b3782c16f3afe83f90e78d893046221070f1e"
    ),
}
"""Digests that the release before gave."""


def test_the_digest_is_64_hex_digits() -> None:
    assert len(NAMESPACE.digest) == 64
    assert int(NAMESPACE.digest, 16)


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_of_the_wall_changes_the_digest(name: str) -> None:
    changed = msgspec.structs.replace(NAMESPACE, **{name: CHANGED[name]})
    assert changed.digest != NAMESPACE.digest


def test_the_list_above_is_complete() -> None:
    assert set(CHANGED) | {"tokenizer", "pool"} == set(Namespace.__struct_fields__)


@pytest.mark.parametrize("namespace", BEFORE)
def test_digests_and_bytes_are_those_of_the_release_before(namespace: Namespace) -> None:
    """What is stored is found again, and older releases understand the record."""
    assert namespace.digest == BEFORE[namespace]
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(namespace))
    assert list(sent) == list(Namespace.__struct_fields__[:-1])


def test_a_pool_is_a_namespace_of_its_own() -> None:
    pool = NAMESPACE.in_pool("house")
    assert (pool.pool, pool.tenant, pool.lora) == ("house", "", "lora")
    assert len({pool.digest, pool.in_pool("annex").digest, NAMESPACE.digest}) == 3
    assert pool.digest == NAMESPACE.for_tenant("another", "lora").in_pool("house").digest
    assert pool.model_digest == NAMESPACE.model_digest
    raw = msgspec.msgpack.encode(pool)
    assert msgspec.msgpack.decode(raw, type=Namespace) == pool


@pytest.mark.parametrize("tenant", ["", "house", "pool=house"])
def test_no_tenant_is_a_pool(tenant: str) -> None:
    pool = NAMESPACE.in_pool("house")
    space = pool.for_tenant(tenant, pool.lora)
    assert not space.pool
    assert space.digest != pool.digest
    assert space.is_of(tenant)
    assert not pool.is_of(tenant)


@pytest.mark.parametrize("fields", [{"pool": ""}, {"pool": "x" * 65}, {"pool": "p", "tenant": "t"}])
def test_pools_that_nobody_can_name(fields: dict[str, str]) -> None:
    """An empty name would be a namespace that is neither a pool nor what it was before."""
    sent = msgspec.to_builtins(NAMESPACE.for_tenant("")) | fields
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(sent, Namespace)


@pytest.mark.parametrize(
    "layout",
    [
        KVLayout(3, 1, 4, "float32"),
        KVLayout(2, 2, 4, "float32"),
        KVLayout(2, 1, 8, "float32"),
        KVLayout(2, 1, 4, "float16"),
    ],
)
def test_every_part_of_the_layout_changes_the_digest(layout: KVLayout) -> None:
    assert msgspec.structs.replace(NAMESPACE, layout=layout).digest != NAMESPACE.digest


def test_values_cannot_slip_from_one_field_into_the_next() -> None:
    first = msgspec.structs.replace(NAMESPACE, revision="ab", kv_dtype="c")
    second = msgspec.structs.replace(NAMESPACE, revision="a", kv_dtype="bc")
    assert first.digest != second.digest


def test_the_tokenizer_is_no_part_of_the_wall() -> None:
    elsewhere = msgspec.structs.replace(NAMESPACE, tokenizer="/another/folder")
    assert elsewhere.digest == NAMESPACE.digest


def test_another_process_agrees() -> None:
    code = (
        "import sys, msgspec\nfrom kvshare_store.namespace import Namespace\n"
        "print(msgspec.json.decode(sys.argv[1], type=Namespace).digest)"
    )
    for seed in ("0", "1"):
        answer = subprocess.run(
            [sys.executable, "-c", code, msgspec.json.encode(NAMESPACE).decode()],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        assert answer.stdout.strip() == NAMESPACE.digest


def test_for_tenant() -> None:
    assert NAMESPACE.for_tenant("tenant", "lora") is NAMESPACE
    other = NAMESPACE.for_tenant("someone else")
    assert (other.tenant, other.lora) == ("someone else", "")
    assert other.digest != NAMESPACE.digest
    assert other.layout == NAMESPACE.layout


@pytest.mark.parametrize("name", ["tenant", "lora", "model", "tokenizer", "rope", "ranks"])
def test_texts_that_are_too_long_are_named(name: str) -> None:
    assert not NAMESPACE.too_long
    assert msgspec.structs.replace(NAMESPACE, **{name: "x" * 20_000}).too_long == name
    assert msgspec.structs.replace(NAMESPACE, tenant="\ud800ß" * 300).too_long == "tenant"


def test_a_namespace_survives_the_wire() -> None:
    raw = msgspec.msgpack.encode(NAMESPACE)
    assert msgspec.msgpack.decode(raw, type=Namespace) == NAMESPACE


@pytest.mark.parametrize(
    "given", [(0, 1, 4, "float32"), (2, 0, 4, "float32"), (2, 1, -4, "float32"), (2, 1, 4, "int8")]
)
def test_layouts_that_make_no_sense(given: tuple[int, int, int, str]) -> None:
    with pytest.raises(ConfigError):
        KVLayout(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["", "house"])
def test_it_is_pickled_without_a_look_at_other_modules(pool: str) -> None:
    """An engine's scheduler hands it to its workers in this way."""
    namespace = Namespace("m", KVLayout(2, 1, 4, "float32"))
    namespace = namespace.in_pool(pool) if pool else namespace
    pickled = pickle.dumps(namespace)
    assert pickle.loads(pickled) == namespace  # noqa: S301 - made one line above
    assert b"UNSET" not in pickled
