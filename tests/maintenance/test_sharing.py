"""Several stores, each with its own host and disk, one remote tier and one catalogue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.errors import ConfigError
from kvshare_store.namespace import Namespace
from tests.maintenance.test_upkeep import ASKED_ONLY
from tests.support.meanwhile import hold
from tests.support.neighbours import (
    NAMESPACE,
    Machine,
    collect_all,
    knows,
    learn,
    remote_blocks,
    save,
    until,
)
from tests.support.oracle import Driver, prompt


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


def test_a_conversation_moves_to_another_machine(machine: Machine) -> None:
    """Its rows are those of the first machine, in the context that they were computed in: the book
    knows every prompt that was computed in part."""
    one, other = (machine(name, policy="aggressive") for name in "ab")
    other.book = one.book
    first = prompt(1, 60)
    edited = [*first[:20], 7, 8, *first[22:]]
    second = [*edited, *prompt(2, 20)]
    third = [*second, *prompt(3, 20)]
    save(one, first)
    assert one.serve_and_save(edited) is not None
    one.store.flush()
    until(lambda: knows(other, edited))
    plan = other.plan(second)
    assert (plan.exact, plan.continued, plan.generation) == (22, 60, 1)
    other.finish(plan)
    other.save(second, plan)
    other.store.flush()
    until(lambda: knows(one, second))
    back = one.serve(third)  # and home again
    assert (back.exact, back.continued, back.generation) == (22, 80, 1)
    assert back.contexts == plan.contexts
    strict = one.serve(third, policy="exact")
    assert (strict.reused, strict.continued) == (22, 0)


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


def after(
    patch: pytest.MonkeyPatch, engine: Driver, call: str, happens: Callable[[], object]
) -> None:
    """Something happens once a call of the catalogue is through, the first time that it is made."""
    catalog = engine.store.repository.catalog
    real = getattr(catalog, call)

    def called(*arguments: Any, **options: Any) -> Any:
        patch.setattr(catalog, call, real)
        answer = real(*arguments, **options)
        happens()
        return answer

    patch.setattr(catalog, call, called)


def test_what_is_being_removed_is_not_learned(machine: Machine) -> None:
    """A machine that has just started reads every row, also one that it is about to remove."""
    node = save(machine("a", **ASKED_ONLY), prompt(1, 40))
    other, go_on = machine("b", **ASKED_ONLY), threading.Event()
    hold(other.store.nodes.queue, go_on)
    other.store.nodes.remove([str(node)])
    learn(other)
    gone = not knows(other, prompt(1, 40))
    go_on.set()
    other.store.flush()
    learn(other)
    assert gone
    assert not knows(other, prompt(1, 40))


def test_a_row_of_a_new_namespace_is_learned_although_its_record_came_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit of this machine, while it learns, shows it the row and not the record."""
    one, other = machine("a", **ASKED_ONLY), machine("b", **ASKED_ONLY)
    save(other, prompt(2, 40))
    learn(other)
    guest = Driver(one.store, Namespace("another model", NAMESPACE.layout))
    save(one, prompt(3, 40))

    def meanwhile() -> None:
        save(guest, prompt(1, 40))
        save(other, prompt(4, 40))

    after(monkeypatch, other, "refresh", meanwhile)
    learn(other)
    assert [knows(other, prompt(seed, 40)) for seed in (1, 3)] == [True, True]
    assert other.store.stats()["errors"] == {}


def test_what_no_machine_uses_leaves_the_remote_tier(machine: Machine, tmp_path: Path) -> None:
    one, other = machine("a"), machine("b")
    save(one, prompt(1, 40))
    save(one, prompt(2, 40))
    until(lambda: knows(other, prompt(2, 40)))
    one.store.clear()
    save(one, prompt(2, 40))
    until(lambda: not knows(other, prompt(1, 40)) and knows(other, prompt(2, 40)))

    other.store.collect()
    assert remote_blocks(tmp_path) == 10, "somebody may be about to use them"
    collect_all(other)
    assert remote_blocks(tmp_path) == 5
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
