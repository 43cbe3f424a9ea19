"""What a worker finds at the start: kernel blocks smaller than scheduled ones, layers it does not
know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from kvshare_store.errors import UnsupportedError
from tests.engine.harness import Engine, Fresh, kept_engine, random_runs

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

KERNEL_BLOCK = 32
LENGTH = 200


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Let the CPU's attention accept blocks of 32 tokens only, like attention backends of
    accelerators."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CPUAttentionBackend,
            "get_supported_kernel_block_sizes",
            staticmethod(lambda kv_cache_spec=None: [KERNEL_BLOCK]),
        )
        yield kept_engine(
            tmp_path_factory,
            kvshare={"policy": "aggressive"},
            block_size=4 * KERNEL_BLOCK,
            enable_prefix_caching=True,
        )


def test_blocks_that_are_split_for_the_kernel_hold_the_right_rows(
    engine: Engine, fresh: Fresh
) -> None:
    assert engine.worker.cache.layers[0].kv_cache.shape[2] == KERNEL_BLOCK
    others, prompt = [fresh(LENGTH) for _ in range(2)], fresh(LENGTH)
    for other in others:  # so that the prompt's blocks are not the first of the cache
        engine.store(other)
    full = engine.store(prompt)
    engine.forget()
    with engine.counted() as gained:
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_exact"] == 1
    with engine.keeping(lambda length: random_runs(length, seed=3)), engine.counted() as gained:
        engine.forget()
        assert engine.ask(prompt).agrees(full)
    assert gained["hits_edited"] == 1
    engine.check_idle()


@pytest.fixture
def unknown_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that was built differs from what its configuration suggests."""

    def refuse(config: Any) -> None:
        raise UnsupportedError("KVShare cannot move K rotated by SpiralEmbedding")

    monkeypatch.setattr("kvshare_connectors.vllm.capability.model_rope", refuse)


def test_a_worker_that_cannot_serve_the_model_leaves_the_engine_as_it_is(
    engine: Engine, fresh: Fresh, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = fresh(LENGTH)
    full = engine.store(prompt, policy="exact")
    request.getfixturevalue("unknown_rotation")
    with caplog.at_level(logging.WARNING, "kvshare"):
        later = Engine(engine.home)  # this closes the other one
    try:
        (said,) = [r.getMessage() for r in caplog.records if r.name == "kvshare"]
        assert said.endswith("without reuse: KVShare cannot move K rotated by SpiralEmbedding")
        before = later.client.stats()
        assert later.ask(prompt).agrees(full)  # its plan was made before the worker could report it
        assert later.ask(prompt).agrees(full)
        after = later.client.stats()
        assert after["declined"]["worker_unsupported"] == 1
        assert after["hits_exact"] == before["hits_exact"]
        assert not later.scheduler.requests
    finally:
        later.close()
