"""How an engine is asked, and what it is told of KVShare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.engines import process
from examples.engines.engine import Answer, Engine, kvshare_settings

STAND_IN = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
asked = json.loads(input())
assert asked == {"do": "ask", "text": "hello", "salt": "s", "max_tokens": 1, "chat": True}, asked
answer = {"ttft_s": 0.5, "tokens": 3, "cached": 0, "token_ids": [1], "text": "x"}
print(json.dumps({"result": answer}), flush=True)
"""


def test_an_engine_is_asked_in_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    real = process.subprocess.Popen

    def start(command, **kwargs):
        started.append(command)
        return real([sys.executable, "-c", STAND_IN], **kwargs)

    monkeypatch.setattr(process.subprocess, "Popen", start)
    with (tmp_path / "log").open("w") as log, Engine("one", {"model": "m"}, log) as engine:
        assert engine.ready() == "1"
        assert engine.ask("hello", "s") == Answer(0.5, 3, 0, [1], "x")
    assert json.loads(started[0][-1]) == {"model": "m"}


def test_settings_of_the_store_reach_the_connector() -> None:
    transfer = kvshare_settings(home="h", host_bytes=1)["kv_transfer_config"]
    assert transfer["kv_connector_extra_config"] == {"kvshare.home": "h", "kvshare.host_bytes": 1}
