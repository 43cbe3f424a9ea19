"""Store.load: rows of a plan, with K rotated for the positions of the request."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from kvshare_store.config import StoreConfig
from kvshare_store.errors import LeaseError, PlanError, UnsupportedError
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.tensors.rope import Rope
from tests.support.oracle import positions_of, prompt

LAYOUT = KVLayout(2, 1, 8, "float32")
NAMESPACE = Namespace("rotary", LAYOUT)
TOKENS = prompt(1, 60)
LONGER = [*TOKENS[:20], 5, 6, 7, *TOKENS[20:]]


@pytest.fixture
def rope() -> Rope:
    angles = torch.outer(torch.arange(200.0), 100.0 ** -(torch.arange(4.0) / 4))
    return Rope(angles.cos(), angles.sin(), neox=True)


def computed(tokens: list[int], rope: Rope) -> torch.Tensor:
    """Rows whose unrotated K depends on the token alone, rotated for where the token stands."""
    rows = torch.empty(LAYOUT.shape(len(tokens)))
    for at, token in enumerate(tokens):
        values = np.random.default_rng(token).standard_normal((2, 2, 1, 8))
        rows[:, :, at] = torch.from_numpy(values).float()
    first, second = rows[:, 0, ..., :4].clone(), rows[:, 0, ..., 4:].clone()
    cos, sin = rope.cos[: len(tokens), None], rope.sin[: len(tokens), None]
    rows[:, 0, ..., :4] = first * cos - second * sin
    rows[:, 0, ..., 4:] = second * cos + first * sin
    return rows


@pytest.fixture
def filled(config: Callable[..., StoreConfig], rope: Rope) -> Store:
    store = Store(config(eviction="lru"))
    assert store.save(TOKENS, NAMESPACE, computed(TOKENS, rope).numpy())
    return store


def test_exact_rows_are_the_bytes_that_were_saved(filled: Store, rope: Rope) -> None:
    with filled as store:
        plan = store.plan(TOKENS, NAMESPACE)
        loaded = store.load(plan)
        assert loaded.positions.tolist() == list(range(59))
        expected = computed(TOKENS, rope)[:, :, :59]
        assert torch.equal(loaded.rows.view(torch.int32), expected.view(torch.int32))
        stats = store.stats()
        assert (stats["leases"], stats["hits_exact"]) == (0, 1)
        assert stats["bytes_loaded"] == 59 * LAYOUT.row_bytes


def test_moved_rows_are_rotated_to_where_they_go(filled: Store, rope: Rope) -> None:
    with filled as store:
        plan = store.plan(LONGER, NAMESPACE)
        assert plan.exact == 20
        loaded = store.load(plan, rope)
        assert loaded.positions.tolist() == positions_of(plan.spans)
        expected = computed(LONGER, rope)[:, :, loaded.positions]
        assert torch.equal(loaded.rows[:, :, :20], expected[:, :, :20])
        assert torch.equal(loaded.rows[:, 1], expected[:, 1])
        torch.testing.assert_close(loaded.rows[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)
        stored = computed(TOKENS, rope)[:, 0, 20:59]
        assert not torch.allclose(loaded.rows[:, 0, 20:], stored, atol=1e-2)
        assert store.stats()["tokens_reused_edited"] == plan.reused - 20


def test_rows_of_a_child_are_rotated_from_their_root_once(filled: Store, rope: Rope) -> None:
    with filled as store:
        plan = store.plan(LONGER, NAMESPACE)
        fresh = [at for at in range(len(LONGER)) if at not in positions_of(plan.spans)]
        rows = computed(LONGER, rope)[:, :, fresh].contiguous()
        assert store.save(LONGER, NAMESPACE, rows.numpy(), plan)
        store.finish(plan, Outcome(edited=plan.reused))
        store.evict(nodes=1)
        longest = [*LONGER[:10], 9, 9, *LONGER[10:]]
        plan = store.plan(longest, NAMESPACE)
        assert plan.generation == 2
        loaded = store.load(plan, rope)
        expected = computed(longest, rope)[:, :, loaded.positions]
        torch.testing.assert_close(loaded.rows, expected, atol=1e-5, rtol=1e-5)


def test_without_a_rotary_table_nothing_moves(filled: Store) -> None:
    with filled as store:
        plan = store.plan(LONGER, NAMESPACE)
        with pytest.raises(UnsupportedError):
            store.load(plan)
        stats = store.stats()
        assert (stats["leases"], stats["hits_edited"]) == (0, 0)
        assert stats["declined"] == {"unsupported": 1}


def test_a_span_beyond_its_block_is_refused(filled: Store) -> None:
    """A client with a bug may ask for it; rows of the next block must not be read instead."""
    with filled as store:
        plan = store.plan(TOKENS, NAMESPACE)
        last = plan.spans[-1]
        beyond = msgspec.structs.replace(last, row=plan.blocks[last.block].rows - last.length + 1)
        with pytest.raises(PlanError, match="beyond its block"):
            store.load(msgspec.structs.replace(plan, spans=(*plan.spans[:-1], beyond)))


def test_rows_that_left_are_not_loaded(filled: Store) -> None:
    with filled as store:
        plan = store.plan(TOKENS, NAMESPACE, owner="dies")
        store.reap({"dies"})
        store.clear()
        with pytest.raises(LeaseError):
            store.load(plan)
        stats = store.stats()
        assert stats["lookups"] == stats["misses"] == 1
