"""The pages as they are sent: nothing that a prompt or a name holds becomes a part of them."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest

from kvshare_store.daemon import protocol
from kvshare_store.daemon.client import Client
from kvshare_store.http.history import History
from kvshare_store.nodes.delta_tree import DeltaTree
from kvshare_store.nodes.state import NodeState
from tests.support.daemons import ClientDriver
from tests.support.oracle import Driver, prompt
from tests.support.page import BEARING, CATALOGUE, CHILD, EVIL, PARENT, TENANT, Page, World, seen


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
    assert "(assumed 5,000 tokens/s: nothing measured yet)" in read.text
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


def test_a_request_that_its_engine_declined_says_whose_it_was(
    driver: Callable[..., Driver],
) -> None:
    engine = driver()
    alice = engine.namespace.for_tenant(TENANT)
    engine.store.outcomes.decline("policy_off", 30, f"cmpl-{EVIL}", alice)
    engine.store.outcomes.decline("late", 9)
    listed = Page(seen(engine.store, "/requests?declined=true").text).text
    named, nameless = (
        Page(seen(engine.store, f"/explain?request={number}").text).text for number in (1, 2)
    )
    for said in (listed, named):
        for words in (f"cmpl-{EVIL}", TENANT, "miss: policy_off"):
            assert words in said
    assert "declined before any plan was made" in named
    assert "It is not known whose it was." in nameless


# --- the first view -------------------------------------------------------------------------------


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
    assert seen(store, history=history).status_code == 200
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
    text = seen(engine.store, history=history).text
    read = Page(text).text
    assert "Tokens reused40of all prompt tokens40.0 %" in "".join(read.splitlines())
    assert "40 of 100 prompt tokens reused (40.0 %) between" in read
    (legend,) = re.findall(r'<ul class="legend".*?</ul>', text, re.S)
    shares = {"exact": 40.0, "continued": 0.0, "edited": 0.0, "in the engine's own cache": 30.0,
              "recomputed": 30.0}  # fmt: skip
    found = re.findall(r"^(.+?) ([\d,]+) ([\d.]+) %$", Page(legend).text, re.M)
    assert {kind: float(share) for kind, _, share in found} == shares
    assert "saved" not in read


def test_the_overview_has_the_share_of_edited_prompts_that_are_settled(
    driver: Callable[..., Driver],
) -> None:
    engine = driver(policy="aggressive")
    first = prompt(1, 200)
    edited = [*first[:60], *prompt(2, 5), *first[65:]]
    engine.serve_and_save(first)
    assert "Edited prompts settled" not in Page(seen(engine.store).text).text
    about = 'title="computed again in full, so exact"'
    for save, share in ((engine.serve_and_save, "0.0 %"), (engine.save, "100.0 %")):
        save(edited)
        sent = seen(engine.store).text
        text = "".join(Page(sent).text.splitlines())
        assert f"Edited prompts settled{share}" in text
        assert about in sent


def test_what_was_not_looked_up_has_no_time(driver: Callable[..., Driver]) -> None:
    """Nor does what was not loaded. What the reason means stands beside the request."""
    engine = driver()
    engine.store.outcomes.decline("load_timeout", 30)
    assert "0.00 ms" not in Page(seen(engine.store, "/requests").text).text
    text = Page(seen(engine.store, "/explain?request=1").text).text
    assert "0.00 ms" not in text
    assert "load_timeout: the rows were lost while they were loaded" in text


def test_the_requests_say_what_the_engines_cache_had(driver: Callable[..., Driver]) -> None:
    engine = driver()
    asked = engine.store.plan_soon(prompt(1, 40), engine.namespace, request="chat-1")
    assert asked.result().declined
    engine.store.outcomes.engine_cached(32, "chat-1")
    (row,) = re.findall(r"<tr><th scope=\"row\".*?</tr>", seen(engine.store, "/requests").text)
    assert re.findall(r'class="number">(\d+)<', row) == ["40", "0", "0", "0", "32", "8"]
