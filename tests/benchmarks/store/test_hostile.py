"""A client is timed beside an attack on a real daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.store import hostile
from benchmarks.store.lookups import NAMESPACE, save_families
from kvshare_store.daemon.client import Client
from tests.support.attacks import ATTACKS, computing
from tests.support.daemons import Daemon


def test_plans_beside_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "PROMPTS", 2)
    with (
        Daemon(hostile.configured(str(tmp_path / "home"))) as daemon,
        Client(daemon.config.home_path, timeout=60.0) as client,
    ):
        save_families(client, NAMESPACE, hostile.PROMPTS)
        before = client.stats()
        row = hostile.row_of("hoarded", client, daemon.config.home_path, 0.3)
        after = client.stats()
    assert (row[0], len(row)) == ("hoarded", 7)
    assert int(row[1] or 0) > 0
    assert all(float(cell or 0) > 0 for cell in row[1:])
    assert after["lookups"] - before["lookups"] > int(row[1] or 0), "the attacker has asked too"


def test_an_attack_that_does_not_begin_is_no_measurement(tmp_path: Path) -> None:
    assert computing.__name__ not in ATTACKS
    with (
        pytest.raises(RuntimeError, match="did not begin"),
        hostile.attacked("no such attack", tmp_path),
    ):
        pass
