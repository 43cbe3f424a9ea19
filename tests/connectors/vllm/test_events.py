"""Which blocks are announced to routers, and when they are withdrawn."""

from __future__ import annotations

from typing import Any

import pytest
from kvshare_connectors.vllm.events import Announced, Prompt
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = 4


def prompt(*blocks: str, salt: str = "") -> Prompt:
    """Blocks named by letters, each of four tokens."""
    first = (("cache_salt", salt),) if salt else None
    return Prompt(
        tuple(BlockHash(name.encode() * 32) for name in blocks),
        tuple(token for name in blocks for token in [ord(name)] * BLOCK),
        (first, *[None] * (len(blocks) - 1)),
        None,
    )


def names(event: Any) -> str:
    every = {maybe_convert_block_hash(BlockHash(name.encode() * 32)): name for name in "abc"}
    return "".join(every[digest] for digest in event.block_hashes)


def test_a_prompt_is_announced_whole() -> None:
    (event,) = Announced(BLOCK).add("node", prompt("a", "b", salt="acme"))
    assert isinstance(event, BlockStored)
    assert (names(event), event.parent_block_hash, event.block_size) == ("ab", None, BLOCK)
    assert event.token_ids == [97] * BLOCK + [98] * BLOCK
    assert event.medium == "CPU"
    assert event.extra_keys == [("acme",), None]


def test_a_common_beginning_is_announced_once() -> None:
    announced = Announced(BLOCK)
    announced.add("one", prompt("a", "b"))
    (event,) = announced.add("two", prompt("a", "b", "c"))
    assert names(event) == "c"
    assert event.parent_block_hash == maybe_convert_block_hash(BlockHash(b"b" * 32))
    assert event.token_ids == [99] * BLOCK
    assert announced.add("three", prompt("a")) == []
    assert announced.add("two", prompt("a", "b", "c")) == []


def test_a_block_is_taken_back_with_its_last_prompt() -> None:
    announced = Announced(BLOCK)
    announced.add("one", prompt("a", "b"))
    announced.add("two", prompt("a", "c"))
    (event,) = announced.remove("one")
    assert isinstance(event, BlockRemoved)
    assert (names(event), event.medium) == ("b", "CPU")
    assert announced.remove("one") == []
    (event,) = announced.remove("two")
    assert names(event) == "ac"
    assert len(announced) == 0
    (event,) = announced.add("one", prompt("a", "b"))
    assert names(event) == "ab"
