"""Prompts that are saved while others leave: they are stored as they were told, or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from kvshare_store.commit.rewrite import Rewriter
from kvshare_store.errors import MissingBlockError
from kvshare_store.nodes.vectors import VECTOR_DIMENSIONS
from kvshare_store.save.staging import Buffer
from kvshare_store.store import Store
from kvshare_store.tensors.frame import Block
from tests.support.meanwhile import PATIENCE_S, hold, reopened
from tests.support.oracle import Driver, prompt
from tests.support.tiers import disk_level, drop_from_host
from tests.support.waiting import until

Open = Callable[..., Driver]


@contextmanager
def deleting(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are deleted only when the context ends; the event says that one is about to be."""
    disk = disk_level(store)
    begun, go_on, delete = threading.Event(), threading.Event(), disk.tier.delete

    async def late(name: str) -> bool:
        begun.set()
        while not go_on.is_set():  # other blocks are read and written meanwhile
            await asyncio.sleep(0.01)
        return await delete(name)

    monkeypatch.setattr(disk.tier, "delete", late)
    try:
        yield begun
    finally:
        go_on.set()


def test_rows_that_are_being_deleted_are_not_built_on(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The donor of a save is forgotten while its rows are on their way."""
    engine = driver()
    tokens, longer = prompt(1, 40), prompt(1, 40) + prompt(2, 20)
    donor = engine.save(tokens)
    engine.store.flush()
    staged = engine.stage(longer, engine.serve(longer))
    assert staged.rows == 20
    with deleting(engine.store, monkeypatch) as begun:
        engine.store.nodes.remove([str(donor)])
        assert begun.wait(PATIENCE_S)
        assert engine.commit(staged) is None, "nobody may be told that it is stored"
    again = reopened(engine, driver)
    assert again.plan(longer).declined == "empty_store"


def test_rows_that_come_back_while_they_are_deleted_stay(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows are saved anew: they count as nowhere else, so they stay in the host, whatever
    is loaded after them, until they are written again."""
    engine = driver(host_bytes=1 << 13)
    tokens, others = prompt(1, 40), [prompt(seed, 40) for seed in range(2, 10)]
    for other in others:
        engine.save(other)
        engine.store.flush()
    donor = engine.save(tokens)
    engine.store.flush()
    with deleting(engine.store, monkeypatch) as begun:
        engine.store.nodes.remove([str(donor)])
        assert begun.wait(PATIENCE_S)
        assert engine.save(tokens) == donor
        for other in others:
            assert engine.serve(other).exact == 39
    again = reopened(engine, driver)
    assert again.serve(tokens).exact == 39


def test_rows_that_were_lost_and_are_saved_again_stay(driver: Open) -> None:
    """They are found in no tier just before a prompt with the very same rows is there."""
    engine = driver()
    tokens, longer = prompt(1, 40), prompt(1, 40) + prompt(2, 20)
    engine.save(tokens)
    engine.store.flush()
    drop_from_host(engine.store)
    blocks = engine.store.blocks
    lost = blocks.names()
    for name in lost:
        engine.store.repository.home.joinpath(f"blocks/{name[:2]}/{name}.kvb").unlink()
    staged = engine.stage(longer)
    rows, end = engine._computed[staged.id], staged.rows * engine.namespace.layout.row_bytes

    class Meanwhile(Buffer):
        def read_into(self, offset: int, target: memoryview) -> None:
            rows.read_into(offset, target)
            while lost and offset + len(target) == end:
                with pytest.raises(MissingBlockError):
                    blocks.read(name := lost.pop())
                with engine.store.nodes.lock:
                    blocks.pool.lose(name)

    saved = str(engine.store.commit(staged.id, Meanwhile(b"")))
    engine.store.nodes.remove_lost()
    engine.store.flush()
    assert saved in engine.store.tree
    again = reopened(engine, driver)
    assert again.serve(longer).exact == 59


def test_a_prompt_that_becomes_another_ones_beginning_is_stored_once(driver: Open) -> None:
    """While it is saved, a longer one is, and is shortened to the very same tokens. An engine that
    computes a prompt again gets other bits."""
    engine = driver()
    tokens, shorter = prompt(1, 64), prompt(1, 56)
    staged = engine.stage(shorter)
    longer = engine.save(tokens)
    engine.store.flush()
    nodes = engine.store.nodes
    with nodes.lock:
        node = nodes.tree.get(str(longer))
        assert node is not None
        change = nodes.shorten(node, 1)
        nodes.queue.put(nodes.removal(change.nodes))
    assert [node.tokens.tolist() for node in nodes.tree] == [shorter]
    blocks = nodes.tree.blocks()
    other_rows = Buffer(bytes(staged.rows * engine.namespace.layout.row_bytes))
    assert engine.store.commit(staged.id, other_rows) in nodes.tree
    engine.store.flush()
    engine.store.collect()
    assert nodes.tree.blocks() == blocks
    again = reopened(engine, driver)
    assert again.serve(shorter).exact == 55


def test_a_text_vector_commits_no_row_before_its_blocks(driver: Open) -> None:
    """While the vector waits for the committer its node leaves and comes back, with other bits."""
    engine = driver()
    tokens, nodes, go_on = prompt(1, 40), engine.store.nodes, threading.Event()
    node = str(engine.save(tokens))
    engine.store.flush()
    catalog = engine.store.repository.catalog
    assert catalog is not None
    hold(nodes.queue, go_on)
    vectors = {node: np.full(VECTOR_DIMENSIONS, VECTOR_DIMENSIONS**-0.5, np.float32)}
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(Rewriter(engine.store.repository).describe, vectors)
        until(lambda: nodes.queue.report()["waiting"] == 1, PATIENCE_S)
        row = nodes.queue.call(lambda: next(catalog.load(ids=[node]))[0].blocks)
        nodes.remove([node])
        staged = engine.stage(tokens)
        rows = Buffer(bytes(staged.rows * engine.namespace.layout.row_bytes))
        assert engine.store.commit(staged.id, rows) == node
        go_on.set()
        written.result(PATIENCE_S)
    assert not set(row.result(PATIENCE_S)) & nodes.tree.blocks(), "not the form that comes later"
    engine.store.flush()
    assert next(catalog.load(ids=[node]))[0].blocks == nodes.tree.get(node).blocks  # type: ignore[union-attr]


def test_blocks_stay_while_a_row_names_them(driver: Open) -> None:
    """Two prompts share blocks. One has left memory, and the removal of its row waits; then room is
    made by removing the other."""
    engine = driver()
    first, second = prompt(1, 40), [*prompt(1, 40)[:24], *prompt(2, 16)]
    nodes, go_on = engine.store.nodes, threading.Event()
    names = [str(engine.save(tokens)) for tokens in (first, second)]
    engine.store.flush()
    shared = set.intersection(*(set(node.blocks) for node in nodes.tree))
    assert len(shared) == 3
    hold(nodes.queue, go_on)
    room = engine.store.repository.durable.room
    catalog, disk = engine.store.repository.catalog, disk_level(engine.store).tier
    assert catalog is not None
    made = nodes.queue.call(lambda: room.delete(nodes.drop([names[1]]).unused))
    left = nodes.queue.call(lambda: (set(disk.names()), len(list(catalog.load(ids=[names[0]])))))
    nodes.remove([names[0]])
    go_on.set()
    made.result(PATIENCE_S)
    on_disk, rows = left.result(PATIENCE_S)
    assert rows == 1
    assert shared <= on_disk
    engine.store.flush()
    assert not set(disk.names()) & shared, "they go with the row"


def test_a_prompt_that_is_saved_again_while_its_first_save_fails_is_stored(
    driver: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left before it was durable, so its first save ends in nothing; the second has the same
    rows."""
    engine = driver()
    nodes, disk, busy = engine.store.nodes, disk_level(engine.store), threading.Event()
    begun, go_on, put = threading.Event(), threading.Event(), disk.tier.put

    async def late(name: str, block: Block) -> None:
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        await put(name, block)

    hold(nodes.queue, busy)
    node = str(engine.save(prompt(1, 40)))
    engine.save(prompt(2, 40))
    nodes.remove([node])
    monkeypatch.setattr(disk.tier, "put", late)
    busy.set()
    assert begun.wait(PATIENCE_S), "the first has failed, the second is being written"
    assert engine.save(prompt(1, 40)) == node
    go_on.set()
    assert node in reopened(engine, driver).store.tree


def test_a_removal_that_is_done_twice_counts_once(driver: Open) -> None:
    """A batch that fails is done again piece by piece."""
    engine = driver()
    engine.save(prompt(1, 40))
    engine.store.flush()
    nodes = engine.store.nodes
    with nodes.lock:
        (node,) = nodes.tree
        first, second = nodes.removal([node]), nodes.removal([node])
        for _ in range(2):
            nodes.removed([first])
        assert nodes.named(node.blocks[0]), "the other removal still waits"
        nodes.removed([second])
        assert not nodes.named(node.blocks[0])
