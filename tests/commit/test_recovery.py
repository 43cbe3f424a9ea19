"""What a start makes of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from kvshare_store.catalog.catalog import Catalog
from kvshare_store.commit import recovery
from kvshare_store.nodes.state import NodeState
from tests.support.oracle import Driver, prompt

Open = Callable[..., Driver]
PROMPTS = [prompt(seed, 40) for seed in range(5)]


def test_rows_of_many_batches_are_all_found(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are indexed in another thread, some at a time, while the next are read."""
    engine = driver()
    saved = [str(engine.save(tokens)) for tokens in PROMPTS]
    indexed: list[int] = []
    fill = NodeState.fill
    monkeypatch.setattr(recovery, "_AT_ONCE", 2)
    monkeypatch.setattr("kvshare_store.catalog.table_reader.TableReader.read_rows", 1)

    def counted(state: NodeState, rows: Any) -> None:
        indexed.append(sum(map(len, rows.values())))
        fill(state, rows)

    monkeypatch.setattr(NodeState, "fill", counted)
    engine = driver()
    assert indexed == [2, 2, 1]
    assert [node.id for node in engine.store.tree] == saved
    for tokens in PROMPTS:
        plan = engine.plan([*tokens, 1, 2, 3])
        assert plan.reused == len(tokens)
        engine.finish(plan)


def test_a_start_that_cannot_index_fails(driver: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that lacks prompts without a word would compute them all again."""
    driver().save(PROMPTS[0])

    def no_memory(*_: Any) -> None:
        raise MemoryError("as if")

    with monkeypatch.context() as patch:
        patch.setattr(NodeState, "fill", no_memory)
        with pytest.raises(MemoryError, match="as if"):
            driver()
    assert len(driver().store.tree) == 1


def test_a_node_with_a_second_row_whose_blocks_are_gone_keeps_its_row(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are removed by their node's id: the row that serves it would go too."""
    saved = str(driver().save(PROMPTS[0]))
    load = Catalog.load_batches

    def repeated(catalog: Catalog) -> Iterator[list[recovery.Row]]:
        for batch in load(catalog):
            gone = [(replace(node, blocks=["ab" * 32]), vectors) for node, vectors in batch]
            yield [*gone, *batch]
            yield gone

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "load_batches", repeated)
        assert [node.id for node in driver().store.tree] == [saved]
    engine = driver()
    assert [node.id for node in engine.store.tree] == [saved]
    assert engine.plan(PROMPTS[0]).reused


PARTS = [
    *(f"store.parts.{part}" for part in ("TextVectors", "open_quality", "Janitor")),
    *(f"commit.repository.{part}" for part in ("NodeState", "BlockStore", "CommitQueue")),
    *(f"commit.repository.{part}" for part in ("NodeStore", "Durable", "Committer")),
    *(f"commit.home.{part}" for part in ("Catalog", "open_levels", "make_policy")),
]


@pytest.mark.parametrize("part", PARTS)
def test_a_store_that_lacks_a_part_leaves_its_home_unlocked(
    driver: Open, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("as if")

    with monkeypatch.context() as patch:
        patch.setattr(f"kvshare_store.{part}", no_memory)
        with pytest.raises(MemoryError, match="as if"):
            driver()
    assert driver().save(PROMPTS[0])
