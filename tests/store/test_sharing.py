"""Several stores, each with its own host and disk, one remote tier and one catalogue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvshare_store import janitor
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Namespace
from kvshare_store.store import Store
from kvshare_store.tensors.layout import KVLayout
from kvshare_store.testing.oracle import Driver, prompt

NAMESPACE = Namespace("model", KVLayout(2, 1, 4, "float32"))
PATIENCE_S = 10.0
Machine = Callable[..., Driver]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Opens the store of one machine by name; all of them share what others can reach."""
    with ExitStack() as opened:

        def open_(name: str, **settings: Any) -> Driver:
            shared = {
                "remote": f"file://{tmp_path / 'remote'}",
                "remote_write": "through",
                "catalog": str(tmp_path / "catalog"),
            }
            config = StoreConfig(
                **{
                    **shared,
                    "home": str(tmp_path / name),
                    "host_bytes": 1 << 20,
                    "disk_bytes": 1 << 20,
                    "block_tokens": 8,
                    "min_prompt_tokens": 8,
                    "min_saving_ms": -1e9,
                    "semantic": "never",
                    "sync_seconds": 0.05,
                    **settings,
                }
            )
            return Driver(opened.enter_context(Store(config)), NAMESPACE)

        yield open_


def until(happens: Callable[[], bool]) -> float:
    """Seconds until it happened; fails when it does not."""
    start = time.monotonic()
    while not happens():
        assert time.monotonic() - start < PATIENCE_S
        time.sleep(0.01)
    return time.monotonic() - start


def knows(engine: Driver, tokens: list[int]) -> bool:
    """Whether the store has a node of exactly this prompt."""
    return any(node.tokens.tolist() == tokens for node in engine.store.tree)


def save(engine: Driver, tokens: list[int]) -> None:
    """Store a prompt and wait until others can see it."""
    engine.save(tokens)
    engine.store.flush()


def test_what_one_machine_computed_another_reuses(machine: Machine) -> None:
    one, other = machine("a"), machine("b")
    save(one, prompt(1, 40))
    until(lambda: knows(other, prompt(1, 40)))
    other.book = one.book
    plan = other.serve(prompt(1, 40))
    assert plan.exact == 39
    use = other.store.stats()["tiers"]
    assert use["host"]["blocks"] == 5
    until(lambda: other.store.stats()["tiers"]["disk"]["blocks"] == 5)
    assert other.store.stats()["errors"] == {}


def test_a_machine_that_starts_later_finds_everything(machine: Machine) -> None:
    one = machine("a")
    for seed in range(3):
        save(one, prompt(seed, 40))
    late = machine("b", disk=False)
    late.book = one.book
    assert [late.serve(prompt(seed, 40)).exact for seed in range(3)] == [39, 39, 39]


def test_an_edit_of_another_machines_prompt_builds_on_its_rows(machine: Machine) -> None:
    one, other = machine("a", policy="aggressive"), machine("b", policy="aggressive")
    other.book = one.book
    save(one, prompt(1, 40))
    until(lambda: knows(other, prompt(1, 40)))
    edited = [*prompt(1, 40)[:20], 7, 8, *prompt(1, 40)[20:]]
    plan = other.serve(edited)
    assert plan.reused >= 32
    other.save(edited, plan)
    other.store.flush()
    until(lambda: knows(one, edited))
    assert one.serve(edited).reused == 41


def test_what_one_machine_removes_is_gone_everywhere(machine: Machine) -> None:
    one, other = machine("a"), machine("b")
    other.book = one.book
    save(one, prompt(1, 40))
    until(lambda: knows(other, prompt(1, 40)))
    assert other.serve(prompt(1, 40)).exact == 39
    one.store.clear()
    until(lambda: not knows(other, prompt(1, 40)))
    assert other.plan(prompt(1, 40)).declined == "empty_store"
    other.store.collect()  # a copy may have been on its way to the disk
    assert other.store.blocks.names() == set()


def test_what_no_machine_uses_leaves_the_remote_tier(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("a"), machine("b")
    save(one, prompt(1, 40))
    save(one, prompt(2, 40))
    until(lambda: knows(other, prompt(2, 40)))
    one.store.clear()
    save(one, prompt(2, 40))
    until(lambda: not knows(other, prompt(1, 40)) and knows(other, prompt(2, 40)))

    def kept() -> int:
        return sum(file.is_file() for file in (tmp_path / "remote" / "blocks").rglob("*"))

    other.store.collect()
    assert kept() == 10, "somebody may be about to use them"
    monkeypatch.setattr(janitor, "SHARED_GRACE_S", 0.0)
    other.store.collect()
    assert kept() == 5
    late = machine("c")
    late.book = one.book
    assert late.serve(prompt(2, 40)).exact == 39


def test_a_full_disk_lets_blocks_go_and_no_node(machine: Machine) -> None:
    one = machine("a", disk_bytes=20_000, host_bytes=8 * 640)
    for seed in range(12):
        save(one, prompt(seed, 40))
    assert len(one.store.tree) == 12
    assert [one.serve(prompt(seed, 40)).exact for seed in range(12)] == [39] * 12
    use = one.store.stats()["tiers"]["disk"]
    assert use["blocks"] < 60
    assert use["bytes"] <= use["budget"]


def test_rows_that_the_remote_lost_are_a_miss_and_can_be_saved_again(
    machine: Machine, tmp_path: Path
) -> None:
    one, other = machine("a"), machine("b", disk=False)
    other.book = one.book
    save(one, prompt(1, 40))
    until(lambda: knows(other, prompt(1, 40)))
    for file in (tmp_path / "remote").rglob("*"):
        if file.is_file():
            file.unlink()
    assert other.plan(prompt(1, 40)).declined == "not_resident"
    until(lambda: not knows(one, prompt(1, 40)))
    save(one, prompt(1, 40))
    until(lambda: knows(other, prompt(1, 40)))
    assert other.serve(prompt(1, 40)).exact == 39


@pytest.mark.parametrize(
    "settings",
    [
        {"remote": ""},
        {"remote_write": "back"},
        {"catalog": "", "disk_write": "back", "remote_write": "back"},
        {"catalog": "", "disk": False, "remote_write": "back"},
        {"catalog": "ftp://somewhere"},
    ],
)
def test_what_would_lose_committed_rows_is_refused(
    machine: Machine, settings: dict[str, Any]
) -> None:
    with pytest.raises((ConfigError, OSError)):
        machine("a", **settings)
