"""A headless Chromium, driven over its DevTools protocol: no driver, no download."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

_START_S = 60.0
_ANSWER_S = 60.0
_QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


def chromium() -> str | None:
    """Path of the browser's executable, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Tab:
    """One page of a browser. Keeps the errors it reported and the addresses it fetched."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        """Script errors, and violations of the content security policy."""
        self.asked: list[str] = []
        """Every address that the page fetched."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Send one DevTools command; returns its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(_ANSWER_S))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        method, found = event["method"], event["params"]
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(found["exceptionDetails"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.complaints.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.asked.append(found["request"]["url"])

    def _await(self, method: str) -> None:
        while all(event["method"] != method for event in self._events):
            self._note(json.loads(self._socket.recv(_ANSWER_S)))

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        self._await("Page.loadEventFired")

    def leave_by(self, script: str) -> None:
        """Run an expression that opens another page, and wait until that page is loaded."""
        self._leave(lambda: self.run(script))

    def leave_with(self, key: str, code: int) -> None:
        """Press a key that opens another page, and wait until that page is loaded."""
        self._leave(lambda: self.press(key, code))

    def _leave(self, act: Callable[[], Any]) -> None:
        self._events.clear()
        act()
        self._await("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Emulate a screen of this kind."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str, code: int) -> None:
        """Press and release one key."""
        text = "\r" if key == "Enter" else ""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                      windowsVirtualKeyCode=code)  # fmt: skip
            text = ""

    def type(self, text: str) -> None:
        """Enter text where the focus is."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A screenshot, as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab in a browser process of its own, with its profile in `folder`."""
    command = chromium()
    assert command is not None
    profile = folder / "chromium"
    with (folder / "chromium.log").open("wb") as log:
        arguments = [command, *_QUIET, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        opened = httpx.put(f"http://127.0.0.1:{port}/json/new?about:blank", timeout=_START_S)
        address = opened.json()["webSocketDebuggerUrl"]
        # a page may be left open for minutes in which nobody reads what the browser says of it
        with connect(address, max_size=None, proxy=None, ping_interval=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(_START_S)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + _START_S
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) > 1:
            return int(lines[0])
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
