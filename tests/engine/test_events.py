"""vLLM's KV events of what the store has, as a router that listens hears them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored

from kvshare_store.daemon import protocol
from tests.engine.harness import BLOCK, Engine, wait_until
from tests.engine.test_behaviour import LENGTH, NEW, edited

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

Fresh = Callable[[int], list[int]]
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(
        tmp_path_factory.mktemp("home"),
        kvshare={"policy": "aggressive"},
        enable_prefix_caching=True,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
    )
    yield engine
    engine.close()


def step(engine: Engine) -> None:
    """Events go out with the engine's steps."""
    engine.ask([5, 6, 7], max_tokens=1, policy="off")


class Router:
    """What a router knows of the store: blocks by hash, with their tokens."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[bytes, list[int]] = {}
        self.of_vllm: set[bytes] = set()
        """Blocks in vLLM's own prefix cache, once."""
        self._engine = engine
        publisher = engine.scheduler.kv_event_publisher
        monkeypatch.setattr(publisher, "publish", self._hear)

    def _hear(self, batch: Any) -> None:
        for event in batch.events:
            if getattr(event, "medium", None) != "CPU":
                self.of_vllm.update(getattr(event, "block_hashes", ()))
            elif isinstance(event, BlockStored):
                assert event.block_size == BLOCK
                assert event.parent_block_hash is None or event.parent_block_hash in self.blocks
                for at, digest in enumerate(event.block_hashes):
                    assert digest not in self.blocks, "announced once"
                    self.blocks[digest] = event.token_ids[at * BLOCK : (at + 1) * BLOCK]
            else:
                assert isinstance(event, BlockRemoved)
                for digest in event.block_hashes:
                    del self.blocks[digest]

    def until(self, known: Callable[[], bool]) -> None:

        def heard() -> bool:
            step(self._engine)
            return known()

        wait_until(heard, PATIENCE_S)

    @property
    def tokens(self) -> list[list[int]]:
        return sorted(self.blocks.values())


@pytest.fixture
def router(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Router:
    engine.clear()
    engine.planning.announcer.forget()  # type: ignore[union-attr]
    step(engine)
    return Router(engine, monkeypatch)


def blocks_of(tokens: list[int]) -> list[list[int]]:
    return [tokens[at : at + BLOCK] for at in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def test_exact_rows_are_announced_and_taken_back(
    engine: Engine, router: Router, fresh: Fresh
) -> None:
    prompt = fresh(LENGTH)
    answer = engine.store(prompt, max_tokens=40)
    whole = [*prompt, *answer.tokens[:-1]]
    router.until(lambda: len(router.blocks) == len(whole) // BLOCK)
    assert router.tokens == sorted(blocks_of(whole))
    assert router.blocks.keys() <= router.of_vllm, "under the hashes that vLLM gives them"
    engine.client.call(protocol.Clear())
    router.until(lambda: not router.blocks)


def test_edited_and_continued_rows_never_are(engine: Engine, router: Router, fresh: Fresh) -> None:
    prompt = fresh(LENGTH)
    engine.store(prompt, max_tokens=1)
    router.until(lambda: len(router.blocks) == LENGTH // BLOCK)
    engine.forget()
    follower = edited(prompt, 44)
    assert engine.store(follower).said["edited"] > 0
    engine.forget()
    assert engine.store([*follower, *NEW]).said["continued"] > 0
    last = fresh(LENGTH)
    engine.store(last, max_tokens=1)
    router.until(lambda: blocks_of(last)[-1] in router.tokens)  # what came before is known, too
    assert router.tokens == sorted([*blocks_of(prompt), *blocks_of(last)])


def test_a_tenants_blocks_have_its_salt(engine: Engine, router: Router, fresh: Fresh) -> None:
    prompt = fresh(LENGTH)
    engine.store(prompt, max_tokens=1)
    engine.store(prompt, max_tokens=1, salt="acme")
    router.until(lambda: len(router.blocks) == 2 * (LENGTH // BLOCK))
    assert router.tokens == sorted(2 * blocks_of(prompt))
    assert router.blocks.keys() <= router.of_vllm


def test_nothing_is_announced_that_new_weights_cannot_use(
    engine: Engine, router: Router, fresh: Fresh
) -> None:
    engine.store(fresh(LENGTH), max_tokens=1)
    router.until(lambda: bool(router.blocks))
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    router.until(lambda: not router.blocks)
