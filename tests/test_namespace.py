"""A namespace is a wall: what is part of it, and that every process draws it the same."""

from __future__ import annotations

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


def test_the_digest_is_64_hex_digits() -> None:
    assert len(NAMESPACE.digest) == 64
    assert int(NAMESPACE.digest, 16)


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_of_the_wall_changes_the_digest(name: str) -> None:
    changed = msgspec.structs.replace(NAMESPACE, **{name: CHANGED[name]})
    assert changed.digest != NAMESPACE.digest


def test_the_list_above_is_complete() -> None:
    assert set(CHANGED) | {"tokenizer"} == set(Namespace.__struct_fields__)


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
