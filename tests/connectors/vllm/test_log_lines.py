"""What an engine's log says, and what it must not say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kvshare_connectors.vllm.metadata import SaveSpec
from kvshare_connectors.vllm.saver import Saver, Snapshot

from kvshare_store.config import StoreConfig
from kvshare_store.observability.logs import JsonLines
from kvshare_store.plan.spans import Run
from kvshare_store.save.staging import Reuse
from tests.connectors.vllm.test_planning import planned, policy, request
from tests.engine.schedulers import LENGTH, NAMESPACE, FakeLink
from tests.support.daemons import serving
from tests.support.silence import check_silent

MARKER = list(range(98_765_430, 98_765_440))
MARKED = [*range(LENGTH - len(MARKER)), *MARKER]


def test_no_line_holds_tokens_of_a_prompt(
    config: Callable[..., StoreConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of requests that have ended (`log_requests`), nor of one that gets less than it asks
    for, nor of a save that fails for an unexpected reason."""
    caplog.set_level(logging.DEBUG, "kvshare")
    planning = planned(FakeLink(), log_requests=True)
    for params in (None, policy("lax"), {"kvshare.unknown": True}):
        wanted = request(prompt_token_ids=MARKED, kv_transfer_params=params)
        planning.state_of(wanted)
        planning.finished(wanted)
    spec = SaveSpec(
        "cmpl-1", NAMESPACE, np.asarray(MARKED, np.int32).tobytes(), Reuse(), [Run(0, LENGTH)], []
    )
    no_rows: Any = SimpleNamespace(release=lambda: None)
    with serving(config()) as server:
        saver = Saver(server.config, NAMESPACE.layout)
        saver.store(Snapshot(spec, no_rows, torch.arange(LENGTH), 0))
        saver.close()
    log = "\n".join(map(JsonLines().format, caplog.records))
    assert log.count('"event": "request"') == 3
    assert "Snapshot failed" in log
    assert "Traceback" in log
    check_silent(log, MARKER)
