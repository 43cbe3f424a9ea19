"""Who is answered, and what is refused before anything looks at it."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from kvshare_store.cli import serve
from kvshare_store.config import StoreConfig
from kvshare_store.errors import ConfigError
from kvshare_store.http.address import Address, listening_socket, parse_address, token_of
from kvshare_store.http.guard import BODY_BYTES, Forms, Guard, RefusedError
from kvshare_store.http.peers import user_of
from tests.support.commands import one_line, run
from tests.support.needs import need
from tests.support.page import BEARING, TOKEN, World

PAGES = ("/", "/tenants", "/requests", "/explain")
QUESTIONS = ("/api/stats", "/api/openapi.json", "/static/page.css", "/metrics", *PAGES)


# --- where it listens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8470", Address("127.0.0.1", 8470)),
        ("localhost:1", Address("127.0.0.1", 1)),
        ("[::1]:8470", Address("::1", 8470)),
        ("0.0.0.0:0", Address("0.0.0.0", 0)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["8470", "127.0.0.1", "example.org:80", "::1:80", "1.2.3:4", ":80"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address; write 127"):
        parse_address(text)
    with pytest.raises(ConfigError, match="there is no port 65536"):
        parse_address("127.0.0.1:65536")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_others_are_listened_to_with_a_token_only(host: str) -> None:
    with pytest.raises(ConfigError, match=r"name it: http_token=FILE \(head -c 32"):
        token_of(StoreConfig(), Address(host, 80))


def test_a_daemon_that_others_would_reach_does_not_start(home: Path) -> None:
    """Nor does it touch its home, or anything of its process."""
    refused = run("serve", "--home", home, "--http", "0.0.0.0:0")
    assert "others reach 0.0.0.0" in one_line(refused, ConfigError.exit_code)
    assert not home.exists()


def test_a_library_that_is_missing_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HTTP_LIBRARIES", ("sys", "no_such_library"))
    refused = run("serve", "--home", home, "--http", "127.0.0.1:0")
    assert "the page needs no_such_library: pip install" in one_line(refused, 6)


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Address(*other.getsockname())
        with pytest.raises(ConfigError, match="Address already in use; choose another port"):
            listening_socket(taken)


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (b"", 0o600, "at least 16 characters"),
        (b"short", 0o600, "at least 16 characters"),
        (b"two words that are long", 0o600, "one word"),
        ("wörter-mit-umlauten".encode(), 0o600, "more than plain characters"),
        (TOKEN.encode(), 0o644, "chmod 600"),
        (None, 0, "cannot be read"),
    ],
)
def test_what_is_no_token_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, why: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=why) as refused:
        token_of(StoreConfig(http_token=str(file)), Address("0.0.0.0", 80))
    assert "http_token" in str(refused.value)


def test_a_token_in_the_home_folder_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="http_token: ~nobody-of-this-name/token cannot be read"):
        token_of(StoreConfig(http_token="~nobody-of-this-name/token"), Address("0.0.0.0", 80))


# --- who asks -------------------------------------------------------------------------------------


def test_the_owner_of_a_connection_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        here, there = client.getsockname(), client.getpeername()
        accepted, _ = server.accept()
        with accepted:
            uid = int(re.findall(r"Uid:\s+(\d+)", Path("/proc/self/status").read_text())[0])
            assert user_of(here, there) == uid
            client.close()  # the kernel's table says 0, which is root, for what is nobody's
            assert user_of(here, there) is None


@pytest.mark.parametrize(
    ("family", "host", "reached"),
    [
        (socket.AF_INET, "127.0.0.1", "::ffff:127.0.0.1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_an_ipv4_address_of_an_ipv6_socket_is_known(
    family: socket.AddressFamily, host: str, reached: str
) -> None:
    """`reached`: the address as the server's side writes it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(family) as client:
        client.connect((host, server.getsockname()[1]))
        here, there = client.getsockname()[1], client.getpeername()[1]
        assert user_of((reached, here), (reached, there)) == os.getuid()


OTHER = """
import os, socket, sys
os.setgid(54321); os.setuid(54321)
for path in sys.argv[2:]:
    with socket.socket() as there:
        there.connect(("127.0.0.1", int(sys.argv[1])))
        there.sendall(f"GET {path} HTTP/1.0\\r\\nHost: 127.0.0.1\\r\\n\\r\\n".encode())
        said = b"".join(iter(lambda: there.recv(4096), b"")).decode()
        print(path, said.split()[1], said.splitlines()[-1])
"""


def test_another_user_of_the_machine_is_not_answered(page: World) -> None:
    need(Path("/proc/self/status").read_text().count("\nUid:\t0\t") == 1, "root")
    port = page.url.rpartition(":")[2]
    command = [sys.executable, "-c", OTHER, port, "/healthz", "/readyz", *QUESTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    alive, ready, *closed = done.stdout.splitlines()
    assert alive.startswith("/healthz 200 ")
    assert ready.startswith("/readyz 200 ")
    assert len(closed) == len(QUESTIONS)
    for line in closed:
        assert " 403 " in line
        assert "only the user that runs the daemon" in line


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Basic ===", "Other x"],
)
def test_without_the_token_nothing_is_answered(owned: World, given: str) -> None:
    for path in QUESTIONS:
        answer = owned.ask("GET", path, headers={"authorization": given} if given else {})
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert owned.ask("GET", "/healthz").status_code == 200


def test_with_the_token_all_is_answered(owned: World) -> None:
    for path in ("/api/stats", "/static/page.css", *PAGES):
        assert (
            owned.ask("GET", path, headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
        )
        assert owned.ask("GET", path, auth=("anybody", TOKEN)).status_code == 200, "a browser"


# --- under which name -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_somebody_made_point_here_is_refused(page: World, host: str) -> None:
    for path in ("/healthz", "/", "/api/stats"):
        answer = page.ask("GET", path, headers={"host": host})
        assert answer.status_code == 421
        assert "open it by its IP address" in answer.json()["message"]


@pytest.mark.parametrize(
    "host",
    ["[::1]evil.example", "[::1]:80.evil.example", "127.0.0.1]evil.example", "[127.0.0.1]",
     "[evil.example]", "[[::1", "::1]", "[::1", "::1", "127.0.0.1:x", "localhost:80:80",
     "me@127.0.0.1", "127.0.0.1/", "127.0.0", "2130706433"],
)  # fmt: skip
def test_what_is_no_host_is_refused(host: str) -> None:
    assert status_of(host) == 421


_PLAIN = set("0123456789abcdefABCDEF:.")
"""What an address and a port are made of."""
words = st.text(st.characters(max_codepoint=255), min_size=1).filter(lambda it: set(it) - _PLAIN)


@given(host=st.sampled_from(["127.0.0.1", "localhost", "[::1]", "[::1]:80"]), word=words)
def test_no_word_before_or_behind_a_host_is_let_in(host: str, word: str) -> None:
    assert status_of(host + word) == status_of(word + host) == 421


def status_of(host: str) -> int:
    """What a request for this host is answered with, at the guard of an application that answers
    everything."""
    said: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        said.append(message)

    scope = {"type": "http", "path": "/healthz", "headers": [(b"host", host.encode("latin-1"))]}
    asyncio.run(Guard(app, "")(scope, receive, send))
    return int(said[0]["status"])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:99", "localhost:", "[::1]:99", "[::1]", "LOCALHOST"]
)
def test_names_of_this_machine(page: World, host: str) -> None:
    assert page.ask("GET", "/healthz", headers={"host": host}).status_code == 200


# --- what changes something -----------------------------------------------------------------------

POSTS = ("/api/purge", "/api/evict", "/api/explain", "/purge", "/explain",
         "/nodes/{child}/pin", "/nodes/{child}/unpin", "/nodes/{child}/evict",
         "/api/nodes/{child}/pin", "/api/nodes/{child}/unpin")  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
def test_nobody_elses_page_can_change_anything(page: World, path: str) -> None:
    path = path.format(child=page.child)
    json = path.startswith("/api/")
    body: dict[str, Any] = {"json": {}} if json else {"data": {"tenant": ""}}
    assert page.ask("POST", path, **body).status_code == 403
    other = csrf_of(page, "/explain" if path != "/explain" else f"/nodes/{page.child}/pin")
    assert posted(page, path, other).status_code == 403, "a form is for one action"
    assert posted(page, path, "9999999999." + "0" * 64).status_code == 403
    assert posted(page, path, "²." + "0" * 64).status_code == 403


def csrf_of(page: World, action: str) -> str:
    form = rf'action="{action}"[^>]*>\s*<input type="hidden" name="csrf" value="([^"]+)"'
    found = re.search(form, page.ask("GET", action).text)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("action", ["pin", "unpin", "evict"])
def test_nothing_is_done_to_a_prompt_by_one_click(page: World, action: str) -> None:
    shown = page.ask("GET", f"/nodes/{page.child}").text
    assert 'method="post"' not in shown
    before = page.ask("GET", f"/api/nodes/{page.child}").json()
    asked = page.ask("GET", f"/nodes/{page.child}/{action}")
    assert asked.status_code == 200
    assert f'action="/nodes/{page.child}/{action}"' in asked.text
    assert page.ask("GET", f"/api/nodes/{page.child}").json() == before


def posted(page: World, path: str, csrf: str, **headers: str) -> httpx.Response:
    if path.startswith("/api/"):
        return page.ask("POST", path, json={}, headers={"x-csrf-token": csrf.encode(), **headers})
    return page.ask("POST", path, data={"csrf": csrf}, headers=headers)


def test_a_form_of_the_page_counts_from_the_page_only(page: World) -> None:
    action = f"/nodes/{page.child}/pin"
    csrf = csrf_of(page, action)
    for origin in ("http://evil.example", "null", page.url + ".evil.example"):
        assert posted(page, action, csrf, origin=origin).status_code == 403
    answer = posted(page, action, csrf, origin=page.url)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/nodes/{page.child}")
    undone = csrf_of(page, f"/nodes/{page.child}/unpin")
    assert posted(page, f"/nodes/{page.child}/unpin", undone).status_code == 303


def test_a_form_is_stale_after_half_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms()
    scope = {"path": "/purge", "headers": []}
    token = forms.token("/purge")
    forms.check(scope, token)
    with pytest.raises(RefusedError):
        Forms().check(scope, token)  # of a daemon before
    monkeypatch.setattr("kvshare_store.http.guard.time.time", lambda: 1e11)
    with pytest.raises(RefusedError):
        forms.check(scope, token)


# --- what every answer carries --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/nothing", "/api/stats", "/static/page.js", "/healthz"])
def test_no_script_runs_but_ours(page: World, path: str) -> None:
    headers = page.ask("GET", path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy["script-src"], policy["style-src"], policy["form-action"]} == {"'self'"}
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == ("max-age=3600" if "static" in path else "no-store")
    assert "server" not in headers


# --- too much -------------------------------------------------------------------------------------


def test_who_asks_is_checked_before_the_body_is_read(owned: World) -> None:
    port = int(owned.url.rpartition(":")[2])
    for length in (1000, BODY_BYTES + 1):
        with socket.create_connection(("127.0.0.1", port), 30.0) as there:
            head = f"POST /explain HTTP/1.1\r\nHost: [::1]\r\ncontent-length: {length}\r\n\r\n"
            there.sendall(head.encode())
            assert there.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_a_body_that_is_too_long_is_refused(owned: World) -> None:
    long = b"x" * (BODY_BYTES + 1)
    said = owned.ask("POST", "/api/explain", content=long, headers=BEARING)
    assert said.status_code == 413
    unsaid = owned.ask("POST", "/api/explain", content=iter([long]), headers=BEARING)
    assert unsaid.status_code in (400, 413)
    assert owned.ask("GET", "/healthz").status_code == 200
