"""The page in a real browser, with a real daemon behind it: by mouse and on a phone."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import Decline, Held, Purge
from tests.support.browser import Tab, browser, chromium
from tests.support.daemons import ClientDriver
from tests.support.judged import judged_world
from tests.support.needs import need
from tests.support.page import PARENT, TENANT, World, world

AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844, "phone": True}
on_both_screens = pytest.mark.parametrize(
    ("screen", "dark"), [(DESK, False), (PHONE, True)], ids=["desk in light", "phone in the dark"]
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon of this file alone, which changes it."""
    need(chromium() is not None, "the system's package chromium")
    with world(tmp_path_factory.mktemp("page")) as made:
        yield made


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon with answers that were scored."""
    need(chromium() is not None, "the system's package chromium")
    with judged_world(tmp_path_factory.mktemp("judged")) as made:
        yield made


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon that keeps the tokens of requests."""
    need(chromium() is not None, "the system's package chromium")
    with world(tmp_path_factory.mktemp("keeping"), log_prompts=True) as made:
        yield made


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    need(chromium() is not None, "the system's package chromium")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def views(page: World) -> list[str]:
    digest = page.space.digest
    return ["/", "/tenants", f"/namespaces/{digest}?whole=true", f"/nodes/{page.child}",
            "/requests", "/quality", "/explain?request=1",
            f"/purge?namespace={digest}"]  # fmt: skip


def scored_views(judged: World) -> list[str]:
    digest = judged.space.digest
    (one,) = judged.ask("GET", "/api/quality").json()["classes"]
    of_class = {"namespace": digest, "traffic": one["known"]["traffic"]}
    return ["/quality", f"/quality?namespace={digest}", f"/quality/class?{urlencode(of_class)}",
            f"/nodes/{judged.child}?policy=aggressive", "/explain?request=5"]  # fmt: skip


def found_by_axe(tab: Tab) -> list[str]:
    """What the accessibility checker axe has against the page, and where."""
    tab.run(AXE.read_text(encoding="utf-8"))
    found = tab.run("axe.run().then(found => JSON.stringify(found.violations))")
    return [f"{one['id']}: {node['html'][:200]}" for one in json.loads(found)
            for node in one["nodes"]]  # fmt: skip


def check_view(tab: Tab) -> None:
    """Nothing is wider than the screen, axe finds nothing, and no prompt has become a script."""
    url = tab.run("location.href")
    tab.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), url
    assert found_by_axe(tab) == [], url
    assert "owned" not in tab.run("document.title")


def check_explained(tab: Tab) -> None:
    """As any view, with all that an explanation may have."""
    assert tab.run("document.querySelectorAll('#plan, #candidates, #difference').length") == 3
    check_view(tab)


@on_both_screens
def test_every_view_can_be_read(
    page: World, judged: World, tab: Tab, screen: dict[str, Any], dark: bool
) -> None:
    """Also, nothing comes from elsewhere."""
    tab.look(**screen, dark=dark)
    for url in [page.url + path for path in views(page)] + [
        judged.url + path for path in scored_views(judged)
    ]:
        tab.open(url)
        check_view(tab)
    assert tab.complaints == []
    assert [url for url in tab.asked if not url.startswith((page.url, judged.url))] == []


@on_both_screens
def test_what_is_explained_and_removed_can_be_read(
    keeping: World, tab: Tab, screen: dict[str, Any], dark: bool
) -> None:
    tab.look(**screen, dark=dark)
    tab.open(keeping.url + "/explain?request=1")
    check_explained(tab)
    paste(tab, keeping, PARENT.replace("bells", "lamps"))
    check_explained(tab)
    with Client(keeping.daemon.config.home_path) as client:
        engine = ClientDriver(client, keeping.space.for_tenant("gone"))
        node, _ = (engine.save(keeping.tokens(text)) for text in (PARENT, "another prompt"))
        client.flush()
    for path, sure, done in (
        (f"/nodes/{node}/evict", "Forget it", "Forgot 1 prompt"),
        ("/purge?tenant=gone", "Purge for good", "Removed for good"),
    ):
        tab.open(keeping.url + path)
        follow(tab, sure)
        assert done in text(tab)
        check_view(tab)
    assert tab.complaints == []


@on_both_screens
def test_errors_can_be_read(page: World, tab: Tab, screen: dict[str, Any], dark: bool) -> None:
    tab.look(**screen, dark=dark)
    for path in ("/nodes/ffff", "/nothing", "/purge", "/explain?request=nobody"):
        tab.open(page.url + path)
        assert tab.run("document.querySelectorAll('[role=alert]').length") == 1, path
        check_view(tab)
    said, tab.complaints[:] = list(tab.complaints), []
    assert all("Failed to load resource" in one for one in said), "of the status, and no more"


def test_colours_follow_the_system_and_differ_without_colour(page: World, tab: Tab) -> None:
    looks = {}
    for dark in (False, True):
        tab.look(**DESK, dark=dark)
        tab.open(f"{page.url}/nodes/{page.child}")
        looks[dark] = {
            kind: tab.run(
                f"[getComputedStyle(document.querySelector('.legend .k-{kind}'))].map(it => "
                "[it.backgroundColor, it.borderBottomStyle, it.borderBottomWidth])[0]"
            )
            for kind in ("exact", "continued", "edited", "recomputed")
        }
    for kinds in looks.values():
        assert len({colour for colour, *_ in kinds.values()}) == 4
        assert len({(style, width) for _, style, width in kinds.values()}) == 4
    assert looks[False]["exact"][0] != looks[True]["exact"][0]


def text(tab: Tab) -> str:
    return str(tab.run("document.querySelector('main').innerText"))


def follow(tab: Tab, label: str) -> None:
    """Click the one link or button that is called so."""
    tab.leave_by(
        "(() => { const found = [...document.querySelectorAll('a, button')].filter(one =>"
        f" (one.ariaLabel || one.innerText).trim() === {json.dumps(label)});"
        " if (found.length !== 1) throw Error(`${found.length} are called so`);"
        " found[0].click(); })()"
    )


def paste(tab: Tab, page: World, prompt: str) -> None:
    """Ask for an explanation of a prompt, where its form is open."""
    tab.run(f"document.querySelector('#text').value = {json.dumps(prompt)}")
    tab.run(f"document.querySelector('#namespace').value = {json.dumps(page.space.digest)}")
    tab.leave_by("document.querySelector('button.main').click()")


def test_a_prompt_is_found_pinned_and_explained(page: World, tab: Tab) -> None:
    """From the first view, as somebody would who has not been here before."""
    tab.look(**DESK)
    tab.open(page.url + "/")
    assert "Stored prompts\n3" in text(tab)
    follow(tab, "Tenants")
    follow(tab, page.space.digest[:12])
    follow(tab, page.parent[:12])
    assert "It has no parent." in text(tab)
    follow(tab, page.child[:12])
    assert "14" in text(tab)
    for question, sure, kept in (
        ("Pin…", "Pin it", "pinned"),
        ("Unpin…", "Unpin it", "while there is room"),
    ):
        follow(tab, question)
        assert found_by_axe(tab) == []
        follow(tab, sure)
        assert "Beside its parent" in text(tab)
        assert kept in text(tab)
    follow(tab, "Explain")
    prompt = PARENT.replace("bells", "lamps\nand bags")
    paste(tab, page, prompt)
    said = text(tab)
    assert f"{len(prompt)} tokens of org/<model>" in said
    assert page.parent[:12] in said
    assert tab.run("document.querySelector('#text').value") == prompt, "line ends as they were"
    assert tab.complaints == []


def test_a_bad_answer_leads_to_what_was_edited(judged: World, tab: Tab) -> None:
    """From the list of the worst to the prompt beside its parent, and to its request."""
    tab.look(**PHONE)
    tab.open(judged.url + "/")
    follow(tab, "Quality")
    assert "Bound: 50.0 %" in text(tab)
    assert TENANT in text(tab)
    follow(tab, f"Prompt {judged.child[:12]} beside its parent")
    assert "differs from full compute from token 3 on" in text(tab)
    pieces = "[...document.querySelectorAll('.prompt span[class^=k-]')].map(one => one.className)"
    assert {"k-exact", "k-edited", "k-recomputed", "k-unused"} <= set(tab.run(pieces))
    follow(tab, "The quality of its class")
    assert "Its worst recent answers" in text(tab)
    tab.leave_by("document.querySelector('a[href^=\"/explain?request=chat\"]').click()")
    assert "differs from full compute from token 3 on" in text(tab)
    assert "Its tokens were not kept" in text(tab)
    assert tab.complaints == []


def test_the_overview_keeps_itself_up_to_date(page: World, tab: Tab) -> None:
    tab.look(**DESK)
    tab.open(page.url + "/")
    before = text(tab)
    with Client(page.daemon.config.home_path) as client:
        client.call(Decline("late", 9))
    tab.run("refresh()")
    assert "Requests\n2" in before
    assert "Requests\n3" in text(tab)
    assert tab.run("document.querySelectorAll('#live').length") == 1
    assert tab.complaints == []


def test_a_name_with_a_line_end_is_no_other_name(page: World, tab: Tab) -> None:
    """Browsers send each line end of a field as CRLF."""
    wanted, other = "a\nb", "a\r\nb"
    with Client(page.daemon.config.home_path) as client:
        for tenant in (wanted, other):
            ClientDriver(client, page.space.for_tenant(tenant)).save(page.tokens(PARENT))
        client.flush()
        tab.open(page.url + "/tenants")
        assert "a␍␊b" in text(tab)
        follow(tab, "Purge a␊b…")
        assert "Purge tenant a␊b" in text(tab)
        follow(tab, "Purge for good")
        assert "Removed for good" in text(tab)
        left = {one["namespace"]["tenant"] for one in client.call(Held(""))}
        assert left >= {other, TENANT}
        assert wanted not in left
        client.call(Purge(tenant=other))


def test_a_tenant_is_purged_once_that_is_confirmed(page: World, tab: Tab) -> None:
    """The last test of this file: the others want what it removes."""
    tab.look(**PHONE)
    tab.open(page.url + "/tenants")
    follow(tab, f"Purge {TENANT}…")
    assert f"Purge tenant {TENANT}" in text(tab)
    follow(tab, "No, keep it")
    assert TENANT in text(tab)
    follow(tab, f"Purge {TENANT}…")
    follow(tab, "Purge for good")
    assert "Removed for good" in text(tab)
    follow(tab, "To the tenants")
    assert TENANT not in text(tab)
    with Client(page.daemon.config.home_path) as client:
        assert client.stats()["nodes"] == 2
