"""A server in a process of its own: how it is started and asked, and how its stream is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.engines import server
from examples.engines.process import EngineError
from examples.engines.server import Server, arguments

STAND_IN = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words): pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["cache_salt"] == "salt", asked
        if asked["messages"][0]["content"] == "refuse":
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"the prompt is too long")
            return
        self.send_response(200)
        self.end_headers()
        if asked["messages"][0]["content"] != "unlogged":
            print("INFO kvshare: request chat-1-0: reused=7 exact=3 recomputed=2 reason=",
                  file=sys.stderr, flush=True)
        words = [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}]
        parts = [{"id": "chat-1", "choices": [{"delta": word}]} for word in words]
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
        for part in [*parts, {"id": "chat-1", "choices": [], "usage": usage}]:
            self.wfile.write(b"data: " + json.dumps(part).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    script = tmp_path / "server.py"
    script.write_text(STAND_IN)
    command = [sys.executable, str(script)]
    return lambda **more: Server("one", command, tmp_path / "log", **more)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_stream_is_read_to_its_end(start: Start) -> None:
    with start() as running:
        running.ready()
        answer = running.ask(said("hello"), "salt", 2)
    assert (answer.text, answer.tokens, answer.computed, answer.report) == ("Hello", 9, 5, {})
    assert answer.ttft_s > 0


def test_what_kvshare_logs_of_a_request_is_its_report(start: Start) -> None:
    with start(kvshare=True) as running:
        running.ready()
        answer = running.ask(said("hello"), "salt")
    assert answer.computed == 2
    assert answer.report == {
        "kvshare.reused": "7", "kvshare.exact": "3", "kvshare.recomputed": "2",
        "kvshare.reason": "",
    }  # fmt: skip


def test_a_request_that_is_refused_says_why(start: Start) -> None:
    with start() as running:
        running.ready()
        with pytest.raises(EngineError, match="the prompt is too long"):
            running.ask(said("refuse"), "salt")


def test_a_request_that_is_not_logged_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_LINE_S", 0.1)
    with start(kvshare=True) as running:
        running.ready()
        with pytest.raises(EngineError, match="no line of the request chat-1"):
            running.ask(said("unlogged"), "salt")


def test_a_server_that_ends_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no server today')"]
    running = Server("one", command, tmp_path / "log")
    with running, pytest.raises(EngineError, match="'one' has stopped"):
        running.ready()
    assert "no server today" in (tmp_path / "log").read_text()


def test_servers_differ_in_kvshare_alone() -> None:
    plain = arguments(Path("model"), None)
    ours = arguments(Path("model"), {"home": "h", "policy": "balanced"})
    assert ours[-4:] == ["--kvshare.home", "h", "--kvshare.policy", "balanced"]
    flags = [part for part in plain if part.startswith("--") and part != "--model"]
    assert flags == [part for part in ours[:-4] if part.startswith("--")]
