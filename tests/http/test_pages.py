"""The pages as they are sent: nothing that a prompt or a name holds becomes a part of them."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable
from concurrent.futures import Future
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode

import httpx
import msgspec
import pytest

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.daemon.questions import answer
from kvshare_store.http.app import routes
from kvshare_store.http.asking import Asking
from kvshare_store.http.history import History
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.state import NodeState
from kvshare_store.store import Store
from tests.support.daemons import ClientDriver
from tests.support.oracle import Driver, prompt
from tests.support.page import BEARING, CATALOGUE, CHILD, EVIL, PARENT, TENANT, World

ALLOWED = {
    "html", "head", "meta", "title", "link", "script", "body", "a", "header", "nav", "ul", "ol",
    "li", "main", "h1", "h2", "h3", "p", "div", "section", "span", "strong", "dl", "dt", "dd",
    "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "form", "input", "label",
    "select", "option", "textarea", "button", "meter", "figure", "figcaption", "svg", "rect",
    "blockquote",
}  # fmt: skip
"""Elements that the templates have. `script` is one, with an address of ours."""


class Page(HTMLParser):
    """Checks while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag in ALLOWED, tag
        assert not [name for name in found if name.startswith("on") or name == "style"], found
        if tag == "script":
            assert found["src"] == "/static/page.js"
        for name in ("href", "src", "action"):
            assert not found.get(name) or re.match(r"[/?#]", found[name] or ""), found
        self.ids += [found["id"]] if found.get("id") else []
        self.elements.append((tag, found))

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(page: World, path: str, **query: Any) -> Page:
    answer = page.ask("GET", path, params=query, headers={"accept": "text/html"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Page(answer.text)


def paths_of(page: World) -> list[str]:
    digest = page.space.digest
    return ["/", "/tenants", f"/namespaces/{digest}", f"/namespaces/{digest}?whole=true",
            f"/nodes/{page.parent}", f"/nodes/{page.child}?full=true", f"/nodes/{page.foreign}",
            f"/nodes/{page.child}?policy=exact", "/requests", "/requests?slow=true",
            "/requests?declined=true", "/explain", "/explain?request=1", "/explain?request=2",
            f"/nodes/{page.child}/evict", f"/purge?namespace={digest}",
            f"/purge?{urlencode({'tenant': TENANT})}"]  # fmt: skip


def test_no_page_is_changed_by_what_it_shows(page: World) -> None:
    for path in paths_of(page):
        answer = page.ask("GET", path, headers={"accept": "text/html"})
        assert answer.status_code == 200, (path, answer.text)
        read = Page(answer.text)
        assert len(read.ids) == len(set(read.ids)), path
        assert [found["lang"] for tag, found in read.elements if tag == "html"] == ["en"]
        assert [tag for tag, _ in read.elements].count("h1") == 1
        fields = [found for tag, found in read.elements if tag in ("select", "textarea")]
        labelled = {found.get("for") for tag, found in read.elements if tag == "label"}
        assert {field["id"] for field in fields} <= labelled


def test_hostile_text_is_shown_as_text(page: World) -> None:
    for path in ("/requests", "/explain"):
        assert EVIL in shown(page, path, request=1).text
    assert EVIL in shown(page, f"/nodes/{page.parent}", full=True).text
    assert TENANT in shown(page, "/tenants").text
    assert f"Purge tenant {TENANT}" in shown(page, "/purge", tenant=TENANT).text
    assert "org/<model>" in shown(page, f"/namespaces/{page.space.digest}").text
    missing = page.ask("GET", "/purge", params={"tenant": EVIL}, headers={"accept": "text/html"})
    assert missing.status_code == 404
    assert "no namespace is of that tenant" in Page(missing.text).text


def test_the_longest_name_has_a_link(page: World) -> None:
    tenant = "\N{BICYCLE}" * 256  # as many bytes as a client may send
    with Client(page.daemon.config.home_path) as client:
        ClientDriver(client, page.space.for_tenant(tenant)).save(page.tokens(PARENT))
        client.flush()
        try:
            link = "/purge?" + urlencode({"tenant": tenant})
            assert f'href="{link}"' in page.ask("GET", "/tenants").text
            assert page.ask("GET", link).status_code == 200
        finally:
            client.call(protocol.Purge(tenant=tenant))


def test_a_failure_is_a_page_for_people_and_json_for_programs(page: World) -> None:
    for path in ("/nodes/ffff", "/nothing", "/nodes/XYZ", "/purge"):
        read = page.ask("GET", path, headers={"accept": "text/html,*/*"})
        assert "That did not work" in Page(read.text).text
        assert page.ask("GET", path).json()["message"] in html.unescape(read.text)


def test_a_prompt_is_beside_its_parent_in_kinds(page: World) -> None:
    text = page.ask("GET", f"/nodes/{page.child}", params={"full": True}).text
    theirs, ours = re.findall(r'<div class="prompt".*?</div>', text, re.S)
    pieces = re.findall(
        r'<span class="k-(\w+)".*?<span class="spoken">\[(\w+): </span>(.*?)<span', ours, re.S
    )
    assert html.unescape("".join(piece for _, _, piece in pieces)) == CHILD
    assert [kind for kind, _, _ in pieces[:2]] == ["exact", "recomputed"]
    assert {kind for kind, _, _ in pieces} == {"exact", "edited", "recomputed"}
    assert pieces[1][1:] == ("edit", "14"), "the rule is said, too"
    assert '<span class="k-unused">' in theirs


def test_long_text_is_shortened_unless_all_is_asked_for(page: World) -> None:
    short, full = (shown(page, f"/nodes/{page.parent}", full=full).text for full in (False, True))
    assert PARENT in full
    assert CATALOGUE not in short
    assert " … " in short


def test_explain_a_pasted_prompt(page: World) -> None:
    form = shown(page, "/explain")
    (csrf,) = [f["value"] for tag, f in form.elements if tag == "input" and f["name"] == "csrf"]
    prompt = PARENT.replace("bells", "lamps")
    sent = {"csrf": csrf, "text": prompt, "tokens": "", "namespace": page.space.digest,
            "policy": "", "full": "true"}  # fmt: skip
    read = Page(page.ask("POST", "/explain", data=sent).text)
    assert f"{len(prompt.encode())} tokens" in read.text
    assert "recomputed" in read.text
    assert page.parent[:12] in read.text
    for wrong, why in (
        ({"text": ""}, "name one prompt"),
        ({"tokens": "[1]"}, "name one prompt"),
        ({"text": "", "tokens": "[1, -1]"}, "greater than or equal to 0"),
        ({"text": "", "tokens": "1 2"}, "no JSON list"),
        ({"text": "", "tokens": "[" * 200_000}, "no JSON list"),
        ({"namespace": ""}, "name one with"),
        ({"policy": "lax"}, "policy: Input should be"),
    ):
        answer = page.ask("POST", "/explain", data=sent | wrong)
        assert answer.status_code in (400, 404)
        read = Page(answer.text)
        assert why in read.text
        kept = (sent | wrong)["text"]
        assert kept in read.text, "what was typed is still there"


def test_the_log_shows_a_prompt_again_where_its_tokens_were_kept(owned: World) -> None:
    query = {"request": "1", "full": "true"}
    text = Page(owned.ask("GET", "/explain", params=query, headers=BEARING).text).text
    assert CHILD in re.sub(r"\[\w+: |\]", "", text)


def test_without_log_prompts_there_is_no_text_of_a_request(page: World) -> None:
    read = shown(page, "/explain", request="1")
    assert "Its tokens were not kept" in read.text
    assert "bike shop" not in read.text


# --- the first view -------------------------------------------------------------------------------


class Inside:
    """A store that is asked in this process, as the daemon asks its own."""

    def __init__(self, store: Store) -> None:
        self.store, self.config = store, store.config

    def ask(self, message: Any, given_up: Any) -> Future[Any]:
        future: Future[Any] = Future()
        counts = isinstance(message, protocol.Stats)
        found = self.store.stats() if counts else answer(self.store, message)
        future.set_result(msgspec.to_builtins(found))
        return future


def seen(store: Store, history: History) -> httpx.Response:
    """The first view."""
    transport = httpx.ASGITransport(routes(Asking(Inside(store), history)))

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/")

    return asyncio.run(get())


def test_the_first_view_looks_at_no_node(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: whoever looks at one of them gets an error."""
    store = driver().store
    history = History()
    history.take(store.stats())

    def refuse(*_: Any) -> Any:
        raise AssertionError("every node was looked at")

    monkeypatch.setattr(DeltaTree, "__iter__", refuse)
    monkeypatch.setattr(NodeState, "of_namespace", refuse)
    assert seen(store, history).status_code == 200
    with pytest.raises(AssertionError):
        store.nodes.state.of_namespace("")


def test_every_share_of_tokens_is_of_the_same_whole(driver: Callable[..., Driver]) -> None:
    """What the engine's own cache had is a part of it."""
    engine, history = driver(), History()
    history.take(engine.store.stats())
    engine.save(prompt(1, 40))
    assert engine.serve([*prompt(1, 40), 7]).exact == 40
    assert engine.plan(prompt(2, 59)).declined
    engine.store.outcomes.engine_cached(30)
    history.take(engine.store.stats())
    text = seen(engine.store, history).text
    read = Page(text).text
    assert "Tokens reused40of all prompt tokens40.0 %" in "".join(read.splitlines())
    assert "40 of 100 prompt tokens reused (40.0 %) between" in read
    (legend,) = re.findall(r'<ul class="legend".*?</ul>', text, re.S)
    shares = {"exact": 40.0, "continued": 0.0, "edited": 0.0, "in the engine's own cache": 30.0,
              "recomputed": 30.0}  # fmt: skip
    found = re.findall(r"^(.+?) ([\d,]+) ([\d.]+) %$", Page(legend).text, re.M)
    assert {kind: float(share) for kind, _, share in found} == shares
    assert "saved" not in read
