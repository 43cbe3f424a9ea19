"""Schedulers that users may choose beside the default: KVShare's synchronous one where vLLM would
run ahead of the output of its steps, and vLLM's own, with which only exact prefixes are reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.errors import LeaseError
from tests.engine.harness import Engine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LENGTH = 150
SHARED = 100


@pytest.mark.parametrize(
    ("scheduler", "ahead"),
    [(None, True), (None, False), ("kvshare_connectors.vllm.KVShareScheduler", True)],
    ids=["vLLM's, ahead", "vLLM's, in step", "KVShare's for in step, ahead"],
)
def test_exact_prefixes_are_served_and_a_failed_load_is_a_miss(
    tmp_path: Path,
    fresh: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    scheduler: str | None,
    ahead: bool,
) -> None:
    prompt = fresh(LENGTH)
    other = [*prompt[:SHARED], *prompt[10:60]]
    engine = Engine(
        tmp_path / "home", ahead=ahead, scheduler_cls=scheduler, enable_prefix_caching=True
    )

    def fail(spec: Any) -> int:
        raise LeaseError("forced")

    try:
        full = engine.ask(other, policy="off")
        engine.store(prompt)
        for budget in (40, None):
            engine.forget()
            with engine.counted() as gained, engine.budget(tokens=budget):
                assert engine.ask(other, policy="exact").agrees(full)
            assert gained["hits_exact"] == 1
            assert gained["tokens_reused_exact"] == (SHARED if budget else LENGTH - 1)
            engine.clear()
            engine.store(prompt)
            engine.forget()
            counted, failing = engine.counted(), monkeypatch.context()
            with counted as gained, engine.budget(tokens=budget), failing as patch:
                patch.setattr(engine.worker, "load_one", fail)
                assert engine.store(other, policy="exact").agrees(full)
            assert gained["declined.load_lease"] == gained["nodes"] == 1
        engine.forget()
        with engine.counted() as gained:
            assert engine.ask(other, policy="exact").agrees(full)
        assert gained["tokens_reused_exact"] == LENGTH - 1
        engine.check_idle()
    finally:
        engine.close()
