"""Three machines on one remote and one catalogue lose nothing. Take out any one protection, and
they do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.blocks.remotes.owner import Owner
from kvshare_store.blocks.tiers import remote as remote_tier
from kvshare_store.catalog.catalog import Catalog
from kvshare_store.catalog.uses import Uses
from kvshare_store.commit.condemned import Condemned
from kvshare_store.commit.node_store import NodeStore
from kvshare_store.maintenance.shared_garbage import SharedGarbage
from tests.support.chaos.machines import run

pytestmark = pytest.mark.fault

Patch = pytest.MonkeyPatch


def rows_told_by_id_alone(patch: Patch) -> None:
    """A machine removes and learns rows by id, whichever form of the row it knew."""
    delete, learn = Catalog.delete, NodeStore.learn

    def delete_any(self: Catalog, ids: Iterable[str], stamps: Any = ()) -> None:
        delete(self, ids)

    def learn_new(
        self: NodeStore, spaces: Any, rows: Any, known: Mapping[str, int], *used: Any
    ) -> None:
        learn(self, spaces, [row for row in rows if row[0].id not in self.tree], known, *used)

    patch.setattr(Catalog, "delete", delete_any)
    patch.setattr(NodeStore, "learn", learn_new)


def a_save_ignores_condemned_blocks(patch: Patch) -> None:
    patch.setattr(Condemned, "rescue", lambda self, names: None)


def a_janitor_believes_its_own_tree(patch: Patch) -> None:
    patch.setattr(SharedGarbage, "named_blocks", lambda self: self._nodes.tree.blocks())


def uses_stay_with_the_machine(patch: Patch) -> None:
    patch.setattr(Uses, "exchange", lambda self: None)


def a_small_machine_evicts_for_all(patch: Patch) -> None:
    def evict(self: NodeStore) -> None:
        self.evict(max(0, len(self.tree) - self._config.max_nodes))

    patch.setattr(NodeStore, "drop_excess", evict)


def nobody_asks_whose_the_prefix_is(patch: Patch) -> None:
    async def check(self: Owner, remote: Any) -> None:
        return None

    patch.setattr(Owner, "check", check)


def any_name_is_a_blocks(patch: Patch) -> None:
    patch.setattr(remote_tier, "_KEY", re.compile(r"^blocks/([^/]+)/(.+)$"))


FOUND_BY: dict[Callable[[Patch], None], int] = {
    rows_told_by_id_alone: 1,
    a_save_ignores_condemned_blocks: 2,
    a_janitor_believes_its_own_tree: 3,
    uses_stay_with_the_machine: 3,
    a_small_machine_evicts_for_all: 4,
    nobody_asks_whose_the_prefix_is: 1,
    any_name_is_a_blocks: 5,
}
"""The protection that is taken out, and the seed that finds it within 24 steps."""


def test_nothing_that_was_committed_is_lost(tmp_path: Path) -> None:
    site = run(tmp_path, 60, 1)
    assert site.findings == []
    assert len(site.kept) > 5


@pytest.mark.parametrize("taken_out", FOUND_BY, ids=lambda taken_out: taken_out.__name__)
def test_what_is_lost_without(
    taken_out: Callable[[Patch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_out(monkeypatch)
    assert run(tmp_path, 48, FOUND_BY[taken_out], to_the_end=False).findings
