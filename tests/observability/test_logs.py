"""The log as JSON: one line an event."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvshare_store.config import StoreConfig
from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.errors import KVShareError
from kvshare_store.namespace import Namespace
from kvshare_store.observability.logs import (
    JsonLines,
    Seldom,
    log_as_json,
    log_process_as,
    with_fields,
)
from kvshare_store.tensors.layout import KVLayout
from tests.support.daemons import ClientDriver, Daemon
from tests.support.page import byte_tokenizer, tokens_of
from tests.support.silence import MARKED, MARKER, check_silent


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """KVShare's logger, put back as it was."""
    log = logging.getLogger("kvshare")
    before = (log.level, log.propagate, list(log.handlers))
    yield log
    log.setLevel(before[0])
    log.propagate, log.handlers = before[1], before[2]


def test_an_event_is_a_line(log: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    log_as_json()
    log_as_json()  # of each engine in a process
    log.setLevel(logging.INFO)
    hostile = 'a\nb", "level": "error\u2028\ud800'
    log.info("kvshare: request %s ended", hostile, extra=with_fields(request=hostile, exact=3))
    try:
        raise OSError("disk\nfull")
    except OSError:
        log.exception("kvshare: it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["request"], first["exact"]) == ("info", hostile, 3)
    assert first["message"] == f"request {hostile} ended"
    assert first["time"].endswith("+00:00")
    assert (second["level"], second["message"]) == ("error", "it failed")
    assert second["error"].endswith("OSError: disk\nfull")


def test_what_a_library_says_is_a_line_too(
    log: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    log_process_as("text")
    log_process_as("json")
    try:
        raise OSError("disk\nfull")
    except OSError:
        logging.getLogger("uvicorn.error").exception("it\nfailed\n")
    log.error("kvshare: ours, once")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["error"].endswith("OSError: disk\nfull")
    assert second["message"] == "ours, once"
    log_process_as("text")
    log.error("kvshare: ours")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ERROR kvshare: ours\n", line)


def test_a_value_that_json_does_not_have() -> None:
    record = logging.makeLogRecord({"msg": "m", "fields": {"path": Path("/tmp"), "at": object}})  # noqa: S108
    assert json.loads(JsonLines().format(record))["path"] == "/tmp"  # noqa: S108


def test_a_daemon_logs_json(config: Callable[..., StoreConfig]) -> None:
    with Daemon(config(log_format="json")) as daemon:
        with Client(daemon.config.home_path) as client:
            client.greet()
        assert daemon.end() == 0
        lines = [json.loads(line) for line in daemon.log().splitlines()]
    assert lines[0]["message"].startswith("serving ")
    assert {line["level"] for line in lines} == {"info"}


def refused(client: Client, message: Any) -> bool:
    try:
        client.call(message)
    except KVShareError:
        return True
    return False


def test_a_daemon_logs_no_prompt(config: Callable[..., StoreConfig], tmp_path: Path) -> None:
    """Neither where all is well, with `log_prompts`, nor where a save or a question fails."""
    folder = byte_tokenizer(tmp_path / "tokenizer")
    space = Namespace("model", KVLayout(2, 1, 4, "float32"), tokenizer=str(folder))
    marked = tokens_of(space, MARKED)
    with Daemon(config(log_format="json", log_prompts=True)) as daemon:
        blocks = daemon.config.home_path / "blocks"
        with Client(daemon.config.home_path) as client:
            engine = ClientDriver(client, space)
            node = engine.save(marked)
            client.flush()
            assert MARKER in client.call(protocol.ShowNode(node or ""))["text"]
            assert client.call(protocol.Explain(text=MARKED))["explanation"]["by_kind"]["exact"]
            for wrong in (
                protocol.Explain(text=MARKED, namespace="ffff"),
                protocol.Plan(space, MARKER.encode() + b"!"),
            ):
                assert refused(client, wrong)
            blocks.rename(tmp_path / "away")
            blocks.touch()
            engine.save(marked[5:])
            assert refused(client, protocol.Flush())
        log = daemon.log()
    lines = [json.loads(line) for line in log.splitlines()]
    assert "1 prompts were not stored" in lines[-1]["message"]
    check_silent(log, tokens_of(space, MARKER))


def test_what_an_engine_says_of_a_request(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    from types import SimpleNamespace

    from kvshare_connectors.vllm.answers import log_line, show_log_lines

    log_as_json()
    show_log_lines()
    state = SimpleNamespace(id="cmpl-1")
    answer = {"kvshare.exact": 5, "kvshare.reason": "", "kvshare.unknown": ["kvshare.x"]}
    log_line(state, answer)  # type: ignore[arg-type]
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["event"] == "request"
    assert (line["request"], line["exact"], line["unknown"]) == ("cmpl-1", 5, ["kvshare.x"])


def test_what_strangers_cause_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    times = iter((0.0, 1.0, 2.0, 3.0, 61.0, 122.0))
    seldom = Seldom(logging.getLogger("kvshare"), lambda: next(times))
    for kind in ("cut", "cut", "tls", "cut", "cut", "cut"):
        seldom.warn(kind, f"a client was {kind}")
    cut, more = "kvshare: a client was cut", " (and 2 more like it since the last such line)"
    assert caplog.messages == [cut, "kvshare: a client was tls", cut + more, cut]
