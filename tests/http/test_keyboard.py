"""The page by keyboard alone, in a real browser with a real daemon behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvshare_store.daemon.client import Client
from kvshare_store.daemon.protocol import ListNodes
from tests.http.test_browser import DESK, tab, text
from tests.support.browser import Tab, chromium
from tests.support.needs import need
from tests.support.page import PARENT, TENANT, World, world

__all__ = ["tab"]

STOPS = 60
"""More than any of these pages has."""
FOCUS = """(() => {
    const one = document.activeElement, at = one.getBoundingClientRect();
    const look = getComputedStyle(one);
    return {
        name: (one.ariaLabel || one.labels?.[0]?.innerText || one.innerText).trim(),
        kind: one.tagName,
        outline: look.outlineStyle === "solid" ? parseFloat(look.outlineWidth) : 0,
        seen: at.width > 0 && at.bottom > 0 && at.top < innerHeight
            && at.right > 0 && at.left < innerWidth,
    };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A daemon of this file alone, which changes it."""
    need(chromium() is not None, "the system's package chromium")
    with world(tmp_path_factory.mktemp("page")) as made:
        yield made


def step(tab: Tab) -> dict[str, Any]:
    """Press Tab; what has the focus now, which everybody can see."""
    tab.press("Tab", 9)
    found: dict[str, Any] = tab.run(FOCUS)
    assert found["kind"] != "BODY", "the focus is nowhere"
    assert found["seen"], found
    assert found["outline"] >= 2, found
    return found


def walk(tab: Tab, name: str, kind: str = "") -> None:
    """Press Tab until the focus is on what is called so."""
    passed = []
    while len(passed) < STOPS:
        found = step(tab)
        if found["name"] == name and found["kind"] in (kind or found["kind"]):
            return
        passed.append(found["name"])
    pytest.fail(f"{name!r} is not reached: {passed}")


def enter(tab: Tab, name: str, kind: str = "") -> None:
    """Go to a link or a button, and press Enter."""
    walk(tab, name, kind)
    tab.leave_with("Enter", 13)


def kept(page: World) -> dict[str, bool]:
    """Whether each prompt that is there is pinned."""
    with Client(page.daemon.config.home_path) as client:
        return {node["id"]: node["pinned"] for node in client.call(ListNodes())}


def test_the_first_stops_lead_past_the_navigation_and_through_it(page: World, tab: Tab) -> None:
    tab.look(**DESK)
    tab.open(page.url + "/")
    assert step(tab)["name"] == "Skip to the content"
    tab.press("Enter", 13)
    assert tab.run("document.activeElement.id") == "main"
    tab.open(page.url + "/")
    seen = [step(tab)["name"] for _ in range(7)]
    assert seen == ["Skip to the content", "KVShare", "Overview", "Tenants", "Requests",
                    "Quality", "Explain"]  # fmt: skip


def test_a_prompt_is_found_in_the_tree_and_explained(page: World, tab: Tab) -> None:
    tab.look(**DESK)
    tab.open(page.url + "/")
    enter(tab, "Tenants")
    enter(tab, page.space.digest[:12])
    enter(tab, page.parent[:12])
    enter(tab, page.child[:12])
    assert "Beside its parent" in text(tab)
    walk(tab, "This prompt")  # a region that scrolls is a stop of its own
    tab.open(page.url + "/")
    enter(tab, "Explain")
    walk(tab, "Text, with all markers of its chat template", "TEXTAREA")
    prompt = PARENT.replace("bells", "lamps")
    tab.type(prompt)
    walk(tab, "Namespace", "SELECT")
    while tab.run("document.activeElement.value") != page.space.digest:
        before = tab.run("document.activeElement.value")
        tab.press("ArrowDown", 40)
        assert tab.run("document.activeElement.value") != before, "the list has ended"
    enter(tab, "Explain", "BUTTON")
    assert f"{len(prompt)} tokens of org/<model>" in text(tab)
    assert page.parent[:12] in text(tab)
    assert tab.complaints == []


@pytest.mark.parametrize(
    ("question", "no", "yes", "said"),
    [
        ("Pin…", "No, leave it", "Pin it", "pinned"),
        ("Unpin…", "No, leave it", "Unpin it", "while there is room"),
        ("Forget…", "No, keep it", "Forget it", "Forgot 1 prompt"),
    ],
)
def test_what_is_done_to_a_prompt_can_be_left_and_done(
    page: World, tab: Tab, question: str, no: str, yes: str, said: str
) -> None:
    """In this order: the last one removes the prompt."""
    before = kept(page)
    tab.look(**DESK)
    tab.open(f"{page.url}/nodes/{page.child}")
    enter(tab, question)
    enter(tab, no)
    assert "Beside its parent" in text(tab)
    assert kept(page) == before
    enter(tab, question)
    enter(tab, yes)
    assert said in text(tab)
    after = kept(page)
    assert after.keys() ^ before.keys() == ({page.child} if question == "Forget…" else set())
    assert after.get(page.child, False) == (question == "Pin…")
    assert tab.complaints == []


def test_a_tenant_can_be_kept_and_purged(page: World, tab: Tab) -> None:
    """The last test of this file: the others want what it removes."""
    tab.look(**DESK)
    tab.open(page.url + "/")
    enter(tab, "Tenants")
    enter(tab, f"Purge {TENANT}…")
    enter(tab, "No, keep it")
    assert page.foreign in kept(page)
    enter(tab, f"Purge {TENANT}…")
    enter(tab, "Purge for good")
    assert "Removed for good" in text(tab)
    assert page.foreign not in kept(page)
    enter(tab, "To the tenants")
    assert TENANT not in text(tab)
