"""Rows from a lossy tier are never exact, whatever their node says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.namespace import Namespace
from kvshare_store.plan import Outcome
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout

LAYOUT = KVLayout(2, 1, 4, "float32")
NAMESPACE = Namespace("model", LAYOUT)
TOKENS = list(range(100, 140))
ROWS = np.random.default_rng(0).standard_normal(40 * LAYOUT.row_bytes // 4).astype(np.float32)


def opened(home: Path, **settings: Any) -> Store:
    return Store(
        StoreConfig(
            home=str(home),
            host_bytes=1 << 20,
            block_tokens=8,
            min_prompt_tokens=8,
            min_saving_ms=-1e9,
            semantic="never",
            **settings,
        )
    )


@pytest.fixture(params=["int8", "fp8"])
def home(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A home with one prompt whose exact rows were lost together with the memory."""
    with opened(tmp_path, disk_codec=request.param) as store:
        assert store.save(TOKENS, NAMESPACE, ROWS.tobytes())
        plan = store.plan(TOKENS, NAMESPACE)
        assert plan.exact == 39, "in memory they are still the rows that were computed"
        store.load(plan)
    return tmp_path, request.param


def test_lossy_rows_are_served_as_edited(home: tuple[Path, str]) -> None:
    with opened(home[0], disk_codec=home[1], policy="aggressive") as store:
        plan = store.plan(TOKENS, NAMESPACE)
        assert (plan.declined, plan.exact, plan.generation) == ("", 0, 1)
        assert plan.reused == 39
        assert not any(span.exact for span in plan.spans)
        # ROWS are in canonical order: [layer, K|V, token, head, dimension]
        computed = ROWS.reshape(LAYOUT.shape(40))[:, :, :39]
        served = store.load(plan).rows.numpy()
        assert 0 < np.abs(served - computed).max() < 0.3
        assert store.stats()["hits_edited"] == 1


def test_a_policy_that_wants_exact_rows_declines_them(home: tuple[Path, str]) -> None:
    with opened(home[0], disk_codec=home[1], policy="exact") as store:
        assert store.plan(TOKENS, NAMESPACE).declined == "lossy"
        assert store.stats()["leases"] == 0


def test_the_exact_rows_take_their_place_once_they_are_computed_again(
    home: tuple[Path, str],
) -> None:
    with opened(home[0], disk_codec=home[1], policy="aggressive") as store:
        store.finish(store.plan(TOKENS, NAMESPACE), Outcome(edited=39))
        longer = [*TOKENS, 7, 8, 9]
        rows = np.ones(LAYOUT.shape(43), np.float32)
        rows[:, :, :40] = ROWS.reshape(LAYOUT.shape(40))
        assert store.save(longer, NAMESPACE, rows.tobytes())
        assert store.plan(longer, NAMESPACE).exact == 42
