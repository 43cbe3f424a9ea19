"""A home that was filled without a running store works."""

from __future__ import annotations

from pathlib import Path

from benchmarks.store import startup
from kvshare_store.config import StoreConfig
from kvshare_store.store import Store


def test_a_filled_home_answers_with_its_last_prompt(home: Path) -> None:
    with Store(StoreConfig(home=str(home), host_bytes=1 << 20, semantic="never")):
        pass
    (home / "blocks").rmdir()
    prompt = startup.fill(home, 64)
    ((opened, answered, counted),) = startup.starts(home, prompt, 1)
    assert 0 < opened < answered < counted
